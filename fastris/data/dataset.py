"""What the data sets share: an index, a split and a compact cache in memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Dataset

from fastris.data.sample import VOID, Sample, in_validation
from fastris.errors import InputError

SPLITS = ("train", "validation", "all")


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
    """A data set of :class:`Sample`, decoded on first use and then kept in memory.

    The cache holds grey images with one channel and labels in the smallest integer that fits: about 0.25 GB
    for DSB2018. Errors in one file are raised when that file is asked for, so that the others can still be
    used; :meth:`preload` asks for all of them.
    """

    def __init__(self, names: list[str], cache: bool = True) -> None:
        self.names = names
        self._cache: dict[int, tuple[np.ndarray, np.ndarray]] | None = {} if cache else None

    def _read(self, index: int) -> Sample:
        """Decode sample `index`; called once an index where the cache is on."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self.names))[index]  # negative indices, and IndexError past the end
        if self._cache is None:
            return self._read(index)
        if index not in self._cache:
            sample = self._read(index)
            self._cache[index] = _pack(sample)
            return sample
        return _unpack(*self._cache[index], self.names[index])

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def preload(self) -> None:
        """Decode everything now, say before worker processes are forked; does nothing without a cache.

        Raises:
            InputError: the first file that cannot be used.
        """
        if self._cache is not None:
            for index in range(len(self)):
                if index not in self._cache:
                    self._cache[index] = _pack(self._read(index))


def _pack(sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    image = sample.image.numpy()
    if (image[0] == image[1]).all() and (image[0] == image[2]).all():
        image = image[:1].copy()
    shifted = sample.labels.numpy() - VOID  # from 0, so that void fits an unsigned integer
    return image, shifted.astype(np.min_scalar_type(sample.count - VOID))


def _unpack(image: np.ndarray, labels: np.ndarray, name: str) -> Sample:
    pixels = np.empty((3, *labels.shape), np.uint8)
    pixels[:] = image
    return Sample(torch.from_numpy(pixels), torch.from_numpy(labels.astype(np.int32) + VOID), name)
