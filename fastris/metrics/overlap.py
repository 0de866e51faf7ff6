"""Joint histogram of a prediction and a label map: what every metric here is computed from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
from torch import Tensor

from fastris.errors import InputError
from fastris.imageio import VOID
from fastris.instances import Instances

LabelMap: TypeAlias = "np.ndarray | Tensor"


@dataclass(frozen=True)
class Overlap:
    """Pixel counts of a prediction with P instances against a target with G, void left out.

    Attributes:
        intersection: int64 (P, G), pixels shared by each pair.
        pred_areas: int64 (P,), pixels of each predicted instance outside void.
        target_areas: int64 (G,), pixels of each target instance outside void.
        void_areas: int64 (P,), pixels of each predicted instance in void.
    """

    intersection: np.ndarray
    pred_areas: np.ndarray
    target_areas: np.ndarray
    void_areas: np.ndarray

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
        pred, target: integers (H, W), numpy or torch, 0 = background, any positive ids. Pixels that are −1 in
            either of them are void: they count for neither, and an instance without other pixels is none.

    Raises:
        InputError: not an integer (H, W) label map, an id below −1, or two different shapes.
    """
    pred_ids, pred_count = _compact(pred, "pred")
    target_ids, target_count = _compact(target, "target")
    _check_sizes(pred_ids.shape, target_ids.shape)
    shape = pred_count + 2, target_count + 2
    joint = np.bincount((pred_ids * shape[1] + target_ids).reshape(-1), minlength=shape[0] * shape[1]).reshape(shape)
    pred_areas, target_areas = joint[2:, 1:].sum(1), joint[1:, 2:].sum(0)
    rows, columns = pred_areas > 0, target_areas > 0
    intersection = joint[2:, 2:][np.ix_(rows, columns)]
    return Overlap(intersection, pred_areas[rows], target_areas[columns], joint[2:, 0][rows])


def overlap_of_instances(pred: Instances, target: LabelMap) -> Overlap:
    """:func:`overlap` of predicted masks that may share pixels; each keeps its row, an empty one too.

    Args:
        pred: P instances.
        target: integers (H, W), 0 = background, −1 = void.

    Raises:
        InputError: as for :func:`overlap`.
    """
    ids, count = _compact(target, "target")
    _check_sizes(pred.size, ids.shape)
    joint = np.empty((len(pred), count + 2), np.int64)
    for row, (box, mask) in zip(joint, pred.crops, strict=True):
        row[:] = np.bincount(ids[box.slices][mask], minlength=count + 2)
    target_areas = np.bincount(ids.reshape(-1), minlength=count + 2)[2:]
    return Overlap(joint[:, 2:], joint[:, 1:].sum(1), target_areas, joint[:, 0])


def as_label_map(labels: LabelMap, name: str) -> np.ndarray:
    """A label map as int64 (H, W).

    Raises:
        InputError: not an integer (H, W) label map, or an id below −1; the message calls it `name`.
    """
    array = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if array.ndim != 2 or not (np.issubdtype(array.dtype, np.integer) or array.dtype == bool):
        raise InputError(f"{name} must be an integer (H, W) label map, got {array.dtype} {array.shape}")
    array = array.astype(np.int64)
    if array.size and array.min() < VOID:
        raise InputError(f"{name} must not have negative ids other than {VOID} (void), got {array.min()}")
    return array


def _check_sizes(pred: tuple[int, ...], target: tuple[int, ...]) -> None:
    if pred != target:
        raise InputError(f"pred and target must have the same shape, got {pred} and {target}")


def _compact(labels: LabelMap, name: str) -> tuple[np.ndarray, int]:
    """int64 (H, W), 0 = void, 1 = background, 2 … n + 1 = the instances without gaps; and n."""
    array = as_label_map(labels, name)
    highest = max(int(array.max()), 0) if array.size else 0
    if highest > 4 * array.size:  # ids far apart, as packed RGB colours are: the table below would be huge
        ids, compact = np.unique(np.append(array, (VOID, 0)), return_inverse=True)
        return compact[:-2].reshape(array.shape), len(ids) - 2
    array += 1
    present = np.bincount(array.reshape(-1), minlength=highest + 2) > 0
    present[:2] = True
    table = np.cumsum(present) - 1
    count = int(table[-1]) - 1
    return (array if count == highest else table[array]), count
