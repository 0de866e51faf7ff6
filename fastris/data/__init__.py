"""Data sets of images with labelled instances, their transforms and batches."""

from __future__ import annotations

from fastris.data.cityscapes import CityscapesDataset
from fastris.data.coco import CocoDataset
from fastris.data.collate import Batch, collate
from fastris.data.cvppp import CvpppDataset
from fastris.data.dataset import InstanceDataset
from fastris.data.folder import FolderDataset
from fastris.data.leaves import LeavesDataset
from fastris.data.nuclei import NucleiDataset
from fastris.data.open import open_dataset
from fastris.data.sample import VOID, Sample, in_validation, relabel
from fastris.data.transforms import (
    Compose,
    Fit,
    IntensityJitter,
    RandomCrop,
    RandomFlip,
    RandomRotation,
    Transform,
    limit_instances,
)
from fastris.data.voc import VocDataset

__all__ = [
    "VOID",
    "Batch",
    "CityscapesDataset",
    "CocoDataset",
    "Compose",
    "CvpppDataset",
    "Fit",
    "FolderDataset",
    "InstanceDataset",
    "IntensityJitter",
    "LeavesDataset",
    "NucleiDataset",
    "RandomCrop",
    "RandomFlip",
    "RandomRotation",
    "Sample",
    "Transform",
    "VocDataset",
    "collate",
    "in_validation",
    "limit_instances",
    "open_dataset",
    "relabel",
]
