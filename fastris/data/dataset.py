"""What the data sets share: an index, a split and a compact cache in memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Dataset

from fastris.data.sample import VOID, Sample, in_validation
from fastris.errors import InputError

SPLITS = ("train", "validation", "all")
CACHE_BYTES = 2 << 30


def check_split(split: str) -> None:
    """Raise InputError unless `split` is one of :data:`SPLITS`."""
    if split not in SPLITS:
        raise InputError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")


def select_split(names: list[str], split: str, fraction: float = 0.1) -> list[str]:
    """The names that belong to `split`, in order.

    A name is held out if :func:`in_validation` says so. Two or more names of which that picks none or all
    give up one to the other side (the one whose turn is next by the same rule), so that neither side of a
    tiny set is empty.
    """
    check_split(split)
    if split == "all":
        return list(names)
    held_out = {name for name in names if in_validation(name, fraction)}
    if len(names) > 1 and fraction > 0 and len(held_out) in (0, len(names)):
        low, high = 0.0, 1.0  # bisect the fraction to the point where exactly one name changes side
        for _ in range(40):
            middle = (low + high) / 2
            inside = {name for name in names if in_validation(name, middle)}
            wanted = 1 if not held_out else len(names) - 1
            if len(inside) == wanted:
                held_out = inside
                break
            low, high = (middle, high) if len(inside) < wanted else (low, middle)
    return [name for name in names if (name in held_out) == (split == "validation")]


class InstanceDataset(Dataset[Sample]):
    """A data set of :class:`Sample`, decoded on first use and then kept in memory as far as there is room.

    The cache holds grey images with one channel and labels in the smallest integer that fits: about 0.25 GB
    for DSB2018. Nothing leaves it, as no sample is likelier to be asked for than another: what comes when it is full is
    decoded each time. Errors in one file are raised when that file is asked for, so that the others can still be
    used; :meth:`preload` asks for them ahead.

    Args:
        names: of the samples.
        cache: the most bytes to keep; True for :data:`CACHE_BYTES`, 2 GiB, and False for none.
    """

    def __init__(self, names: list[str], cache: bool | int = True) -> None:
        self.names = names
        self._cache: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._room = CACHE_BYTES if cache is True else int(cache)

    def _read(self, index: int) -> Sample:
        """Decode sample `index`."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self.names))[index]  # negative indices, and IndexError past the end
        if index in self._cache:
            return _unpack(*self._cache[index], self.names[index])
        sample = self._read(index)
        if self._room:
            packed = _pack(sample)
            size = packed[0].nbytes + packed[1].nbytes
            if size <= self._room:
                self._cache[index] = packed
                self._room -= size
            else:
                self._room = 0
        return sample

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def preload(self) -> None:
        """Decode ahead until the cache is full, say before worker processes are forked; nothing without a cache.

        Raises:
            InputError: the first file that cannot be used.
        """
        for index in range(len(self)):
            if not self._room:
                return
            if index not in self._cache:
                self[index]


def _pack(sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    image = sample.image.numpy()
    grey = (image[0] == image[1]).all() and (image[0] == image[2]).all()
    shifted = sample.labels.numpy() - VOID  # from 0, so that void fits an unsigned integer
    return image[: 1 if grey else 3].copy(), shifted.astype(np.min_scalar_type(sample.count - VOID))


def _unpack(image: np.ndarray, labels: np.ndarray, name: str) -> Sample:
    pixels = np.empty((3, *labels.shape), np.uint8)
    pixels[:] = image
    return Sample(torch.from_numpy(pixels), torch.from_numpy(labels.astype(np.int32) + VOID), name)
