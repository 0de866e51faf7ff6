"""Average precision as the 2018 Data Science Bowl scored it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastris.errors import InputError
from fastris.metrics.overlap import LabelMap, Overlap, overlap

THRESHOLDS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)


def average_precision(pred: LabelMap, target: LabelMap, thresholds: Sequence[float] = THRESHOLDS) -> np.ndarray:
    """TP / (TP + FP + FN) at each IoU threshold, float64 (len(thresholds),).

    A pair is a true positive if its IoU is *greater* than the threshold, as in the competition's rules; above
    one half no instance can be in two such pairs. 1 where both are empty.

    Args:
        pred, target: integer label maps (H, W), 0 = background.
        thresholds: IoU thresholds in [0.5, 1).

    Raises:
        InputError: a threshold outside [0.5, 1).
    """
    return average_precision_from(overlap(pred, target), thresholds)


def mean_average_precision(pred: LabelMap, target: LabelMap) -> float:
    """The mean of :func:`average_precision` over the IoU thresholds 0.5, 0.55, …, 0.95."""
    return float(average_precision(pred, target).mean())


def average_precision_from(counts: Overlap, thresholds: Sequence[float] = THRESHOLDS) -> np.ndarray:
    """:func:`average_precision` from an overlap at hand."""
    limits = np.asarray(thresholds, np.float64)
    if not ((limits >= 0.5) & (limits < 1)).all():
        raise InputError(f"thresholds must lie in [0.5, 1), where matches are unique, got {list(thresholds)}")
    either = len(counts.pred_areas) + len(counts.target_areas)
    if either == 0:
        return np.ones(len(limits))
    hits = np.sort(counts.iou[counts.iou > 0.5])
    true_positives = len(hits) - np.searchsorted(hits, limits, side="right")
    return true_positives / (either - true_positives)
