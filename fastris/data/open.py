"""One door to every data set."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fastris.data.cityscapes import CityscapesDataset
from fastris.data.coco import CocoDataset
from fastris.data.cvppp import CvpppDataset, subset_folders, subset_name
from fastris.data.dataset import InstanceDataset
from fastris.data.folder import FolderDataset
from fastris.data.leaves import LeavesDataset
from fastris.data.nuclei import NucleiDataset
from fastris.data.voc import VocDataset
from fastris.errors import InputError

_EXPECTED = (
    "expected 'leaves' or 'leaves:N', a zip or folder of DSB2018 (<id>/images, <id>/masks), "
    "a folder of <name>_rgb.png with <name>_label.png or of images/ with labels/, "
    "a folder of CVPPP, Pascal VOC, Cityscapes or COCO, or a COCO JSON file"
)
_WITH_CLASSES = (CityscapesDataset, CocoDataset, VocDataset)


def open_dataset(
    path_or_name: str | os.PathLike[str], split: str = "train", data_class: str | None = None, **options: Any
) -> InstanceDataset:
    """The data set that a path or a name means, by the layout of what is there; docs/data.md has the layouts.

    Args:
        path_or_name: "leaves" or "leaves:N" for N generated plants (an existing file or folder of that name
            wins), a DSB2018 zip or folder, a folder of images and label maps, a folder of CVPPP, Pascal VOC,
            Cityscapes or COCO, or a COCO JSON file.
        split: "train", "validation" or "all".
        data_class: of the data sets with classes, the one that counts; None for all.
        **options: passed on: `max_instances`, `size` and `cache` are known to all of them, `min_instances` to those
            with classes.

    Raises:
        InputError: nothing of the kind there, naming the path and what was expected, or a class of a data set without.
    """
    name = os.fspath(path_or_name)
    path = Path(name)
    cls = _class_of(path, name)
    if data_class is not None:
        if not issubclass(cls, _WITH_CLASSES):
            raise InputError(f"data_class: {name} has no classes to choose {data_class!r} from")
        options["data_class"] = data_class
    if cls is not LeavesDataset:
        return cls(path, split, **options)
    length = name.partition(":")[2]
    if length:
        if not length.isdecimal() or int(length) < 1:
            raise InputError(f"{name}: the number of plants must be a positive integer; {_EXPECTED}")
        options = {"length": int(length), **options}
    if options.get("size", 0) is None:  # any size, to the others
        del options["size"]
    return LeavesDataset(split=split, **options)


def _class_of(path: Path, name: str) -> Any:
    """The class for what is at a path."""
    if path.is_dir():
        if any(path.glob("annotations/instances_*.json")):
            return CocoDataset
        if (path / "leftImg8bit").is_dir():
            return CityscapesDataset
        if (path / "SegmentationObject").is_dir():
            return VocDataset
        if subset_name(path) or subset_folders(path):
            return CvpppDataset
        nuclei = any(path.glob("*/images")) or any(path.glob("*/*/images"))
        return NucleiDataset if nuclei else FolderDataset
    if path.is_file():
        by_suffix = {".zip": NucleiDataset, ".json": CocoDataset}
        if path.suffix.lower() not in by_suffix:
            raise InputError(f"{name}: not a data set; {_EXPECTED}")
        return by_suffix[path.suffix.lower()]
    if name.partition(":")[0] == "leaves":
        return LeavesDataset
    raise InputError(f"{name}: no such file or folder; {_EXPECTED}")
