"""Metrics of instance segmentation, from predictions and integer label maps, of one image and of a data set."""

from __future__ import annotations

from fastris.metrics.average_precision import THRESHOLDS, average_precision, mean_average_precision
from fastris.metrics.coco import CocoMetrics
from fastris.metrics.count import absolute_difference_in_count, difference_in_count
from fastris.metrics.dice import best_dice, foreground_background_dice, symmetric_best_dice
from fastris.metrics.instance_metrics import InstanceMetrics
from fastris.metrics.metric import Metric
from fastris.metrics.overlap import Overlap, overlap
from fastris.metrics.region import REGION_THRESHOLDS, AveragePrecisionRegion

__all__ = [
    "REGION_THRESHOLDS",
    "THRESHOLDS",
    "AveragePrecisionRegion",
    "CocoMetrics",
    "InstanceMetrics",
    "Metric",
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
