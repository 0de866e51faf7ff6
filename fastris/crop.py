"""A mask cropped to its box, so that hundreds of them fit in memory whatever the size of the image."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Box(NamedTuple):
    """A rectangle in pixels, bottom and right exclusive."""

    top: int
    left: int
    bottom: int
    right: int

    def __and__(self, other: Box) -> Box:
        """What both cover; maybe nothing."""
        top, left = max(self.top, other.top), max(self.left, other.left)
        bottom, right = min(self.bottom, other.bottom), min(self.right, other.right)
        return Box(top, left, max(top, bottom), max(left, right))

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.bottom - self.top, self.right - self.left

    @property
    def slices(self) -> tuple[slice, slice]:
        """The box as an index into an (H, W) array."""
        return slice(self.top, self.bottom), slice(self.left, self.right)

    def shifted(self, down: int, right: int) -> Box:
        """The same rectangle elsewhere."""
        return Box(self.top + down, self.left + right, self.bottom + down, self.right + right)


class Crop(NamedTuple):
    """One mask: the box that just holds it, and what is in that box.

    Attributes:
        box: where it is; of no size for an empty mask.
        mask: bool (bottom − top, right − left).
    """

    box: Box
    mask: np.ndarray

    @classmethod
    def of(cls, mask: np.ndarray, top: int = 0, left: int = 0) -> Crop:
        """The crop of a bool mask (h, w) whose first pixel lies at (top, left)."""
        rows = np.flatnonzero(mask.any(axis=1))
        if rows.size == 0:
            return cls(Box(0, 0, 0, 0), np.zeros((0, 0), bool))
        columns = np.flatnonzero(mask[rows[0] : rows[-1] + 1].any(axis=0))
        box = Box(int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1)
        return cls(box.shifted(top, left), mask[box.slices].copy())  # no view, which would keep the whole mask alive

    @property
    def area(self) -> int:
        """Pixels of the mask."""
        return int(np.count_nonzero(self.mask))

    def within(self, window: Box) -> np.ndarray:
        """The part of the mask in `window`, bool of the window's size."""
        out = np.zeros(window.size, bool)
        shared = self.box & window
        out[shared.shifted(-window.top, -window.left).slices] = self.mask[
            shared.shifted(-self.box.top, -self.box.left).slices
        ]
        return out

    def shifted(self, down: int, right: int) -> Crop:
        """The same mask elsewhere."""
        return Crop(self.box.shifted(down, right), self.mask)
