"""Leaf images of the CVPPP leaf segmentation challenge."""

from __future__ import annotations

import os
from pathlib import Path

from fastris.data.folder import FolderDataset, find_pairs

SUBSETS = ("A1", "A2", "A3", "A4")


class CvpppDataset(FolderDataset):
    """The CVPPP leaf segmentation challenge: folders A1 to A4 of ``plantNNN_rgb.png`` and ``plantNNN_label.png``.

    The challenge labels no images for validation, so that split is by hash, as in :class:`FolderDataset`. Names have
    their subset before them, "A1/plant001", and an image is in the same split whether one subset is opened or all.

    Args:
        root: one of the folders A1 to A4, or the folder that holds them.
        split, max_instances, size, cache: as of :class:`FolderDataset`, and so the errors.

    Source: Minervini et al., Pattern Recognition Letters 81, 2016; https://www.plant-phenotyping.org/datasets.
    """

    def _find_pairs(self) -> dict[str, tuple[Path, Path | None]]:
        folders = [self.root] if subset_name(self.root) else subset_folders(self.root)
        return {
            f"{subset_name(folder)}/{name}": pair for folder in folders for name, pair in find_pairs(folder).items()
        }


def subset_folders(root: Path) -> list[Path]:
    """The folders A1 to A4 in `root`, as far as they are there."""
    return [root / name for name in SUBSETS if (root / name).is_dir()]


def subset_name(folder: Path) -> str | None:
    """The name of a folder that is called A1 to A4."""
    name = os.path.basename(os.path.abspath(folder))
    return name if name in SUBSETS else None
