"""Joint histogram of two label maps: what every metric here is computed from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
from torch import Tensor

from fastris.errors import InputError

LabelMap: TypeAlias = "np.ndarray | Tensor"


@dataclass(frozen=True)
class Overlap:
    """Pixel counts of a prediction with P instances against a target with G.

    Attributes:
        intersection: int64 (P, G), pixels shared by each pair.
        pred_areas: int64 (P,), pixels of each predicted instance.
        target_areas: int64 (G,), pixels of each target instance.
    """

    intersection: np.ndarray
    pred_areas: np.ndarray
    target_areas: np.ndarray

    @cached_property
    def dice(self) -> np.ndarray:
        """2·|a ∩ b| / (|a| + |b|) of every pair, float64 (P, G)."""
        return 2 * self.intersection / (self.pred_areas[:, None] + self.target_areas[None, :])

    @cached_property
    def iou(self) -> np.ndarray:
        """|a ∩ b| / |a ∪ b| of every pair, float64 (P, G)."""
        return self.intersection / (self.pred_areas[:, None] + self.target_areas[None, :] - self.intersection)


def overlap(pred: LabelMap, target: LabelMap) -> Overlap:
    """Count the pixels that each predicted instance shares with each target instance, in one pass.

    Args:
        pred, target: integers (H, W), numpy or torch, 0 = background, any positive ids.

    Raises:
        InputError: not an integer (H, W) label map, a negative id, or two different shapes.
    """
    pred_ids, pred_count = _compact(pred, "pred")
    target_ids, target_count = _compact(target, "target")
    if pred_ids.shape != target_ids.shape:
        raise InputError(f"pred and target must have the same shape, got {pred_ids.shape} and {target_ids.shape}")
    shape = pred_count + 1, target_count + 1
    joint = np.bincount((pred_ids * shape[1] + target_ids).reshape(-1), minlength=shape[0] * shape[1]).reshape(shape)
    return Overlap(joint[1:, 1:], joint[1:].sum(1), joint[:, 1:].sum(0))


def _compact(labels: LabelMap, name: str) -> tuple[np.ndarray, int]:
    """Ids as int64 0..n without gaps, and n."""
    array = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if array.ndim != 2 or not (np.issubdtype(array.dtype, np.integer) or array.dtype == bool):
        raise InputError(f"{name} must be an integer (H, W) label map, got {array.dtype} {array.shape}")
    array = array.astype(np.int64)
    if array.size == 0:
        return array, 0
    if array.min() < 0:
        raise InputError(f"{name} must not have negative ids, got {array.min()}")
    highest = int(array.max())
    if highest > 4 * array.size:
        ids, compact = np.unique(array, return_inverse=True)
        ids, compact = (ids, compact) if ids[0] == 0 else (np.append(0, ids), compact + 1)
        return compact.reshape(array.shape), len(ids) - 1
    present = np.bincount(array.reshape(-1), minlength=highest + 1) > 0
    present[0] = False
    count = int(present.sum())
    if count == highest:
        return array, count
    return np.where(present, np.cumsum(present), 0)[array], count
