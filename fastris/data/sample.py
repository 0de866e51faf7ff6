"""One labelled image, and the numbering of its instances."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastris.imageio import VOID


@dataclass(frozen=True)
class Sample:
    """One image with its instances.

    Attributes:
        image: uint8 (3, H, W), RGB.
        labels: int32 (H, W); 0 is background, the instances are 1..n without gaps, −1 (:data:`VOID`) is void: pixels
            of which nothing is known, which neither the loss nor the metrics count.
        name: the image's id, for reports and error messages.
    """

    image: Tensor
    labels: Tensor
    name: str

    @property
    def count(self) -> int:
        """The number of instances, n."""
        return max(int(self.labels.max()), 0) if self.labels.numel() else 0

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return self.labels.shape[0], self.labels.shape[1]


def relabel(labels: np.ndarray, min_area: int = 1) -> np.ndarray:
    """Number the instances 1..n in row-major order of their first pixel.

    Args:
        labels: integers (H, W), 0 = background, any positive ids, negative = void.
        min_area: an instance with fewer pixels than this becomes background.

    Returns:
        int32 (H, W), a new array, void −1.
    """
    flat = labels.reshape(-1)
    out = np.where(flat < 0, np.int32(VOID), np.int32(0))
    where = np.flatnonzero(flat > 0)
    if where.size == 0:
        return out.reshape(labels.shape)
    ids = flat[where]
    if int(ids.max()) > 4 * flat.size:  # ids far apart, as packed RGB colours are: the tables below would be huge
        ids = np.unique(ids, return_inverse=True)[1].reshape(-1) + 1
    size = int(ids.max()) + 1
    first = np.zeros(size, np.int64)
    first[ids[::-1]] = where[::-1]  # the last write wins: each id's first pixel
    kept = np.flatnonzero(np.bincount(ids, minlength=size) >= max(min_area, 1))
    table = np.zeros(size, np.int32)
    table[kept[np.argsort(first[kept])]] = np.arange(1, kept.size + 1, dtype=np.int32)
    out[where] = table[ids]
    return out.reshape(labels.shape)


def sample_from_arrays(image: np.ndarray, labels: np.ndarray, name: str) -> Sample:
    """A :class:`Sample` from an RGB image uint8 (H, W, 3) and any instance ids (H, W), negative = void."""
    channels_first = image.transpose(2, 0, 1).copy()  # an array from Pillow is read-only
    return Sample(torch.from_numpy(channels_first), torch.from_numpy(relabel(labels)), name)


def in_validation(image_id: str, fraction: float = 0.1) -> bool:
    """Whether an image is held out, from its id alone, so that the split is the same everywhere."""
    return int(hashlib.sha256(image_id.encode()).hexdigest()[:8], 16) / 2**32 < fraction
