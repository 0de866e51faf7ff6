"""Region average precision AP^r: detection scored by the IoU of masks.

P = detections of an image, G = its targets, N = detections of all images, T = thresholds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from fastris.instances import Instances
from fastris.metrics.metric import Metric
from fastris.metrics.overlap import LabelMap, Overlap, overlap, overlap_of_instances

REGION_THRESHOLDS = tuple(k / 10 for k in range(1, 10))


class AveragePrecisionRegion(Metric):
    """AP^r of one class: the area under the precision-recall curve of detections ranked by score over a data set.

    In each image, in descending order of score, a detection takes the target with which its IoU is highest among
    those not taken, and is a true positive if that IoU is *greater* than the threshold; any other is a false positive.
    The curve has a point for each distinct score, so that neither the order of images nor that of equal scores
    matters, and is interpolated at all points, as VOC does since 2010:

        AP = Σ_k (r_k − r_{k−1}) · max_{j ≥ k} p_j

    Pixels of void count for neither side. A false positive with more than half of its pixels in void is ignored, as VOC
    ignores the detections of "difficult" objects. Without any target, AP is 1 if nothing was detected, else 0.

    Source: Hariharan et al., *Simultaneous Detection and Segmentation*, ECCV 2014, and its released evaluation.
    """

    def reset(self) -> None:
        self._scores: list[np.ndarray] = []  # float64 (P,) an image
        self._hits: list[np.ndarray] = []  # bool (P, T): a true positive
        self._in_void: list[np.ndarray] = []  # bool (P,): more than half of it
        self._targets = 0
        self._images = 0

    def update(self, pred: Instances | LabelMap, target: LabelMap) -> None:
        """Add one image.

        Args:
            pred: instances with scores, whose masks may overlap; or an integer label map (H, W), all of one score.
            target: integer label map (H, W), 0 = background, −1 = void.

        Raises:
            InputError: not an integer (H, W) label map, an id below −1, or two different shapes.
        """
        if isinstance(pred, Instances):
            self.update_from(overlap_of_instances(pred, target), pred.scores)
        else:
            self.update_from(overlap(pred, target))

    def update_from(self, counts: Overlap, scores: np.ndarray | None = None) -> None:
        """:meth:`update` from an overlap at hand, with scores (P,) or all of one score."""
        scores = np.ones(len(counts.pred_areas)) if scores is None else scores.astype(np.float64)
        self._scores.append(scores)
        self._hits.append(match(counts.iou, scores))
        self._in_void.append(counts.void_areas > counts.pred_areas)
        self._targets += len(counts.target_areas)
        self._images += 1

    def state_dict(self) -> dict[str, Any]:
        scores, hits, in_void = self._detections()
        return {
            "scores": torch.from_numpy(scores),
            "hits": torch.from_numpy(hits),
            "in_void": torch.from_numpy(in_void),
            "targets": self._targets,
            "images": self._images,
        }

    def _merge(self, state: Mapping[str, Any]) -> None:
        self._scores.append(state["scores"].numpy())
        self._hits.append(state["hits"].numpy())
        self._in_void.append(state["in_void"].numpy())
        self._targets += state["targets"]
        self._images += state["images"]

    def _value(self) -> dict[str, float]:
        """apr50 … apr90, their mean apr, and AP^r_vol, the mean over 0.1 … 0.9 (apr_vol); NaN without any image."""
        scores, hits, in_void = self._detections()
        values = np.full(len(REGION_THRESHOLDS), np.nan)
        if self._images:
            for k, hit in enumerate(hits.T):
                counted = hit | ~in_void
                values[k] = average_precision_of_ranking(scores[counted], hit[counted], self._targets)
        high = {f"apr{round(100 * t)}": float(v) for t, v in zip(REGION_THRESHOLDS, values, strict=True) if t >= 0.5}
        return {**high, "apr": float(np.mean(list(high.values()))), "apr_vol": float(values.mean())}

    def _detections(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Scores (N,), hits (N, T) and in_void (N,) of all images."""
        empty = np.zeros(0), np.zeros((0, len(REGION_THRESHOLDS)), bool), np.zeros(0, bool)
        lists = self._scores, self._hits, self._in_void
        scores, hits, in_void = (np.concatenate([one, *many]) for one, many in zip(empty, lists, strict=True))
        return scores, hits, in_void


def match(iou: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Which detections of an image are true positives, bool (P, T), each target taken once.

    Args:
        iou: float64 (P, G).
        scores: (P,); the earlier of equal ones goes first.
    """
    limits = np.array(REGION_THRESHOLDS)
    hits = np.zeros((len(iou), len(limits)), bool)
    if iou.size == 0:
        return hits
    taken = np.zeros((len(limits), iou.shape[1]), bool)
    rows = np.arange(len(limits))
    for k in np.argsort(-scores, kind="stable"):
        free = np.where(taken, 0.0, iou[k])  # [T, G]
        best = free.argmax(axis=1)
        hits[k] = free[rows, best] > limits
        taken[rows, best] |= hits[k]
    return hits


def average_precision_of_ranking(scores: np.ndarray, hits: np.ndarray, targets: int) -> float:
    """Area under the interpolated precision-recall curve.

    Args:
        scores: (N,).
        hits: bool (N,), the true positives.
        targets: how many there are to find.
    """
    if targets == 0:
        return float(len(scores) == 0)
    order = np.argsort(-scores, kind="stable")
    scores, found = scores[order], np.cumsum(hits[order])
    last = np.flatnonzero(np.append(scores[1:] != scores[:-1], True)[: len(scores)])  # of each distinct score
    recall, precision = found[last] / targets, found[last] / (last + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * envelope))
