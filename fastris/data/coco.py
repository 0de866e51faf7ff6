"""Data sets in the format of COCO."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastris.data.coco_masks import decode_segmentation
from fastris.data.dataset import check_split, select_split
from fastris.data.label_map import LabelMapDataset, check_class
from fastris.data.sample import VOID
from fastris.errors import InputError

_PATTERNS = {
    "train": ("instances_train*.json",),
    "validation": ("instances_val*.json",),
    "all": ("instances_train*.json", "instances_val*.json"),
}


@dataclass
class _Image:
    path: Path
    json_path: Path
    height: int
    width: int
    annotations: list[dict[str, Any]] = field(default_factory=list)


class CocoDataset(LabelMapDataset):
    """Images and a JSON file of annotations: polygons and run lengths.

    Where masks overlap, the smaller one keeps the pixel. Annotations with ``iscrowd`` are void where no instance is.

    Args:
        root: COCO's own folder, with ``annotations/instances_train*.json`` and ``instances_val*.json``, or one JSON
            file. Images are looked for by their ``file_name`` in the folder of the JSON file and in its ``images``, and
            above that folder in ``images`` and in one named as the file is, such as ``train2017`` or
            ``images/train2017`` for ``annotations/instances_train2017.json``.
        split: "train" and "validation" are the folder's two files and "all" both; of a single file, "validation" is a
            tenth by hash of the ``file_name`` (see :func:`fastris.data.in_validation`) and "all" the whole.
        data_class: the name of a category: the others' objects become background. None for all of them.
        max_instances, min_instances: keep only images with at most, at least this many annotations (of the class),
            crowds aside.
        size: keep only images of this (H, W) in pixels.
        cache: see :class:`InstanceDataset`.

    Raises:
        InputError: a file that is missing or not of this format, images that are nowhere, an unknown class; and on
            access, an annotation that cannot be decoded or an image that is missing, broken or of another size than the
            JSON says, naming file and annotation. Without pycocotools, on access to polygons.

    Source: Lin et al., ECCV 2014; https://cocodataset.org/#format-data.
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
        root = Path(root)
        paths = [root] if root.is_file() else [_find_one(root / "annotations", pattern) for pattern in _PATTERNS[split]]
        self._images: dict[str, _Image] = {}
        for path in paths:
            images = _read(path, data_class)
            if images.keys() & self._images.keys():
                raise InputError(f"{path}: has an image with the file_name of one in {paths[0]}")
            self._images.update(images)
        names = sorted(self._images)
        if root.is_file():
            names = select_split(names, split)
        super().__init__(names, cache, max_instances, size, min_instances)

    def _image_path(self, name: str) -> Path:
        return self._images[name].path

    def _label_path(self, name: str) -> Path:
        return self._images[name].json_path

    def _labels(self, name: str) -> np.ndarray:
        image = self._images[name]
        labels = np.zeros((image.height, image.width), np.int32)
        masks = []
        for annotation in image.annotations:
            try:
                mask = decode_segmentation(annotation.get("segmentation"), image.height, image.width)
            except InputError:
                raise
            except (ValueError, TypeError) as error:
                place = f"{image.json_path}: annotation {annotation.get('id')} of {name}"
                raise InputError(f"{place}: {error}") from None
            if annotation.get("iscrowd"):
                labels[mask] = VOID
            else:
                masks.append(mask)
        for label, mask in enumerate(sorted(masks, key=np.count_nonzero, reverse=True), start=1):
            labels[mask] = label
        return labels

    def _count_and_size(self, name: str) -> tuple[int, tuple[int, int]]:
        image = self._images[name]
        return sum(not one.get("iscrowd") for one in image.annotations), (image.height, image.width)


def _find_one(folder: Path, pattern: str) -> Path:
    paths = sorted(folder.glob(pattern))
    if len(paths) == 1:
        return paths[0]
    found = f"more than one {pattern}" if paths else f"no {pattern}"
    raise InputError(f"{folder}: {found}; a JSON file of its own can be given instead of a folder")


def _read(path: Path, data_class: str | None) -> dict[str, _Image]:
    """The images of a JSON file by name, with the annotations of a class."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot read: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path}: not a JSON file: {error}") from None
    try:
        categories = {one["name"]: one["id"] for one in content["categories"]}
        check_class(data_class, categories)
        sizes = {one["id"]: (one["file_name"], int(one["height"]), int(one["width"])) for one in content["images"]}
        annotations = [(one["image_id"], one["category_id"], one) for one in content["annotations"]]
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not in COCO's format of images, annotations and categories: {error!r}") from None
    if not sizes:
        raise InputError(f"{path}: no images in this file")
    folder = _find_images(path, next(iter(sizes.values()))[0])
    images = {key: _Image(folder / name, path, height, width) for key, (name, height, width) in sizes.items()}
    for image_id, category_id, annotation in annotations:
        if image_id not in images:
            raise InputError(f"{path}: annotation {annotation.get('id')} is of image {image_id}, which is not there")
        if data_class is None or category_id == categories[data_class]:
            images[image_id].annotations.append(annotation)
    by_name = {sizes[key][0]: image for key, image in images.items()}
    if len(by_name) < len(images):
        raise InputError(f"{path}: two images with the same file_name")
    return by_name


def _find_images(path: Path, file_name: str) -> Path:
    """The folder of a JSON file's images: where the first of them is."""
    here, above, own = path.parent, path.absolute().parent.parent, path.stem.removeprefix("instances_")
    folders = [here, here / "images", above / own, above / "images" / own, above / "images"]
    for folder in folders:
        if (folder / file_name).is_file():
            return folder
    raise InputError(f"{path}: cannot find its images: no {file_name} in {', '.join(map(str, folders))}")
