"""One door to every data set."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fastris.data.dataset import InstanceDataset
from fastris.data.folder import FolderDataset
from fastris.data.leaves import LeavesDataset
from fastris.data.nuclei import NucleiDataset
from fastris.errors import InputError

_EXPECTED = (
    "expected 'leaves' or 'leaves:N', a zip or folder of DSB2018 (<id>/images, <id>/masks), "
    "or a folder of <name>_rgb.png with <name>_label.png or of images/ with labels/"
)


def open_dataset(path_or_name: str | os.PathLike[str], split: str = "train", **options: Any) -> InstanceDataset:
    """The data set that a path or a name means.

    Args:
        path_or_name: "leaves" or "leaves:N" for N generated plants (an existing file or folder of that name
            wins), a DSB2018 zip or folder, or a folder of images and label maps.
        split: "train", "validation" or "all".
        **options: passed on: `max_instances`, `size` and `cache` are known to all of them.

    Raises:
        InputError: nothing of the kind there, naming the path and what was expected.
    """
    name = os.fspath(path_or_name)
    path = Path(name)
    if path.is_dir():
        nuclei = any(path.glob("*/images")) or any(path.glob("*/*/images"))
        return (NucleiDataset if nuclei else FolderDataset)(path, split, **options)
    if path.is_file():
        if path.suffix.lower() == ".zip":
            return NucleiDataset(path, split, **options)
        raise InputError(f"{name}: not a data set; {_EXPECTED}")
    kind, _, length = name.partition(":")
    if kind == "leaves":
        if length:
            if not length.isdecimal() or int(length) < 1:
                raise InputError(f"{name}: the number of plants must be a positive integer; {_EXPECTED}")
            options = {"length": int(length), **options}
        if options.get("size", 0) is None:  # any size, to the others
            del options["size"]
        return LeavesDataset(split=split, **options)
    raise InputError(f"{name}: no such file or folder; {_EXPECTED}")
