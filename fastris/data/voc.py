"""Pascal VOC's instance segmentation."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from fastris.data.dataset import check_split
from fastris.data.label_map import LabelMapDataset, check_class, check_same_size
from fastris.data.sample import VOID
from fastris.errors import InputError

CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
"""Of the indices 1 to 20 in ``SegmentationClass``."""

_LISTS = {"train": ("train",), "validation": ("val",), "all": ("train", "val")}
_INDEX_VOID = 255


class VocDataset(LabelMapDataset):
    """Pascal VOC, the folder ``VOC2012`` with ``JPEGImages``, ``SegmentationObject`` and ``SegmentationClass``.

    Index 255, the border around objects and what is too difficult, is void. An object's class is that of most of its
    pixels.

    Args:
        root: the folder.
        split: "train" and "validation" are the images that ``ImageSets/Segmentation`` lists in ``train.txt`` and
            ``val.txt``, "all" both.
        data_class: one of :data:`CLASSES`: objects of the others become background. None for all objects.
        max_instances, min_instances: keep only images with at most, at least this many objects (of the class).
        size: keep only images of this (H, W) in pixels.
        cache: see :class:`InstanceDataset`.

    Raises:
        InputError: no such list, an empty one, an unknown class; and on access, a file that is missing, broken or of
            another size than its image, each naming the file.

    Source: Everingham et al., IJCV 88, 2010; http://host.robots.ox.ac.uk/pascal/VOC/voc2012.
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
        self.data_class = data_class
        names: dict[str, None] = {}  # in order, each once
        for part in _LISTS[split]:
            names.update(dict.fromkeys(_read_list(self.root / "ImageSets" / "Segmentation" / f"{part}.txt")))
        super().__init__(list(names), cache, max_instances, size, min_instances)

    def _image_path(self, name: str) -> Path:
        return self.root / "JPEGImages" / f"{name}.jpg"

    def _label_path(self, name: str) -> Path:
        return self.root / "SegmentationObject" / f"{name}.png"

    def _labels(self, name: str) -> np.ndarray:
        objects = _read_byte_indices(self._label_path(name))
        if self.data_class is not None:
            path = self.root / "SegmentationClass" / f"{name}.png"
            classes = _read_byte_indices(path)
            check_same_size(path, classes, objects, "that of the objects")
            index = CLASSES.index(self.data_class) + 1
            pixels = np.bincount((objects * 256 + classes).reshape(-1), minlength=256 * 256).reshape(256, 256)
            pixels[:, _INDEX_VOID] = 0  # the border says nothing about the class
            other = pixels.argmax(1) != index
            other[_INDEX_VOID] = False
            objects = np.where(other[objects], 0, objects)
        return np.where(objects == _INDEX_VOID, VOID, objects)


def _read_list(path: Path) -> list[str]:
    """The names in a file, one a line."""
    try:
        names = path.read_text(encoding="utf-8", errors="replace").split()
    except OSError as error:
        raise InputError(f"{path}: cannot read this list of images: {error.strerror}") from None
    if not names:
        raise InputError(f"{path}: no images in this list")
    return names


def _read_byte_indices(path: Path) -> np.ndarray:
    from fastris.imageio import read_indices

    indices = read_indices(path)
    if indices.size and indices.max() > _INDEX_VOID:
        raise InputError(f"{path}: expected indices to {_INDEX_VOID}, got {indices.max()}")
    return indices
