"""Metrics of instance segmentation, from pairs of integer label maps."""

from __future__ import annotations

from fastris.metrics.average_precision import THRESHOLDS, average_precision, mean_average_precision
from fastris.metrics.count import absolute_difference_in_count, difference_in_count
from fastris.metrics.dice import best_dice, foreground_background_dice, symmetric_best_dice
from fastris.metrics.instance_metrics import InstanceMetrics
from fastris.metrics.overlap import Overlap, overlap

__all__ = [
    "THRESHOLDS",
    "InstanceMetrics",
    "Overlap",
    "absolute_difference_in_count",
    "average_precision",
    "best_dice",
    "difference_in_count",
    "foreground_background_dice",
    "mean_average_precision",
    "overlap",
    "symmetric_best_dice",
]
