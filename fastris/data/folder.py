"""A folder of images with label maps."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from fastris.data.dataset import check_split, select_split
from fastris.data.label_map import LabelMapDataset
from fastris.errors import InputError

SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".jpg", ".jpeg")
_LAYOUT = "<name>_rgb.png with <name>_label.png, or images/<name>.png with labels/<name>.png"


class FolderDataset(LabelMapDataset):
    """Images and label maps side by side in one folder.

    Two layouts: ``<name>_rgb.png`` with ``<name>_label.png``, as CVPPP names them, or ``images/<name>.png``
    with ``labels/<name>.png``. PNG, TIFF, BMP and JPEG are read (labels from a lossless one); a label map
    holds ids as grey values, palette indices (255 being void) or colours, 0 or black for background.

    Args:
        root: the folder.
        split: "train", "validation" (a tenth, by hash of the name; see :func:`fastris.data.in_validation`) or
            "all". From a folder of few images, at least one is in each split.
        max_instances: keep only images with at most this many instances.
        size: keep only images of this (H, W) in pixels.
        cache: see :class:`InstanceDataset`.

    Raises:
        InputError: no such folder, no images in it; and on access, an image without a label map, a label map
            of another size or a broken file, each naming the file.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "all",
        max_instances: int | None = None,
        size: tuple[int, int] | None = None,
        cache: bool | int = True,
    ) -> None:
        check_split(split)
        self.root = Path(root)
        self._pairs = self._find_pairs()
        if not self._pairs:
            raise InputError(f"{self.root}: no images found; expected {_LAYOUT}")
        super().__init__(select_split(sorted(self._pairs), split), cache, max_instances, size)

    def _find_pairs(self) -> dict[str, tuple[Path, Path | None]]:
        """Image and label map by name."""
        return find_pairs(self.root)

    def _image_path(self, name: str) -> Path:
        return self._pairs[name][0]

    def _label_path(self, name: str) -> Path:
        image_path, label_path = self._pairs[name]
        if label_path is None:
            raise InputError(f"{image_path}: image without masks; expected {_LAYOUT}")
        return label_path

    def _labels(self, name: str) -> np.ndarray:
        from fastris.imageio import read_label_map

        return read_label_map(self._label_path(name))


def find_pairs(root: Path) -> dict[str, tuple[Path, Path | None]]:
    """Image and label map by name; None where an image has no label map."""
    if not root.exists():
        raise InputError(f"{root}: no such folder; expected {_LAYOUT}")
    if not root.is_dir():
        raise InputError(f"{root}: not a folder; expected {_LAYOUT}")
    images = _by_stem(root, "_rgb")
    labels = _by_stem(root, "_label")
    if not images:
        images, labels = _by_stem(root / "images"), _by_stem(root / "labels")
    return {name: (path, labels.get(name)) for name, path in images.items()}


def _by_stem(folder: Path, ending: str = "") -> dict[str, Path]:
    """Image files in a folder whose stem ends in `ending`, by the rest of the stem."""
    if not folder.is_dir():
        return {}
    return {
        path.stem[: len(path.stem) - len(ending)]: path
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in SUFFIXES and path.stem.endswith(ending) and not path.name.startswith(".")
    }
