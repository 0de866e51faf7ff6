"""Cityscapes' instance segmentation, and what is in its format."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from fastris.data.dataset import check_split
from fastris.data.label_map import LabelMapDataset, check_class
from fastris.data.sample import VOID
from fastris.errors import InputError

CLASSES = {
    "person": 24,
    "rider": 25,
    "car": 26,
    "truck": 27,
    "bus": 28,
    "caravan": 29,
    "trailer": 30,
    "train": 31,
    "motorcycle": 32,
    "bicycle": 33,
}
"""The classes with instances, and their ids."""

_UNKNOWN = 3  # ids up to this are unlabeled, ego vehicle, rectification border and out of roi
_FOLDERS = {"train": ("train",), "validation": ("val",), "all": ("train", "val")}
_IMAGE, _LABEL = "_leftImg8bit.png", "_gtFine_instanceIds.png"
_LAYOUT = f"leftImg8bit/<split>/<city>/*{_IMAGE} with gtFine/<split>/<city>/*{_LABEL}"


class CityscapesDataset(LabelMapDataset):
    """Cityscapes: ``leftImg8bit`` and ``gtFine`` with 16-bit ``*_gtFine_instanceIds.png``.

    A pixel's value is 1000 · class + k for instance k, and a bare id where there are no instances to tell apart. Void
    are groups of the wanted classes (such as a crowd, id 24) and the ids 0 to 3, of which nothing is known; all else is
    background.

    Args:
        root: the folder that holds both.
        split: "train" and "validation" are the folders ``train`` and ``val``, "all" both.
        data_class: one of :data:`CLASSES`: objects of the others become background. None for all objects.
        max_instances, min_instances: keep only images with at most, at least this many objects (of the class).
        size: keep only images of this (H, W) in pixels.
        cache: see :class:`InstanceDataset`.

    Raises:
        InputError: no images in the split, an unknown class; and on access, a file that is missing, broken or of
            another size than its image, each naming the file.

    Source: Cordts et al., CVPR 2016; the ids are those of cityscapesScripts' helpers/labels.py.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "train",
        data_class: str | None = None,
        max_instances: int | None = None,
        min_instances: int = 0,
        size: tuple[int, int] | None = None,
        cache: bool | int = True,
    ) -> None:
        check_split(split)
        check_class(data_class, CLASSES)
        self.root = Path(root)
        self._classes = list(CLASSES.values()) if data_class is None else [CLASSES[data_class]]
        self._images = {
            path.name.removesuffix(_IMAGE): path
            for folder in _FOLDERS[split]
            for path in sorted((self.root / "leftImg8bit" / folder).glob(f"*/*{_IMAGE}"))
        }
        if not self._images:
            raise InputError(f"{self.root}: no images found in split '{split}'; expected {_LAYOUT}")
        super().__init__(list(self._images), cache, max_instances, size, min_instances)

    def _image_path(self, name: str) -> Path:
        return self._images[name]

    def _label_path(self, name: str) -> Path:
        split, city = self._images[name].parts[-3:-1]
        return self.root / "gtFine" / split / city / f"{name}{_LABEL}"

    def _labels(self, name: str) -> np.ndarray:
        from fastris.imageio import read_indices

        ids = read_indices(self._label_path(name))
        labels = np.where(np.isin(ids // 1000, self._classes), ids, 0)
        labels[(ids <= _UNKNOWN) | np.isin(ids, self._classes)] = VOID
        return labels
