"""Difference in count."""

from __future__ import annotations

from fastris.metrics.overlap import LabelMap, overlap


def difference_in_count(pred: LabelMap, target: LabelMap) -> int:
    """DiC: instances predicted minus instances there."""
    counts = overlap(pred, target)
    return len(counts.pred_areas) - len(counts.target_areas)


def absolute_difference_in_count(pred: LabelMap, target: LabelMap) -> int:
    """|DiC|."""
    return abs(difference_in_count(pred, target))
