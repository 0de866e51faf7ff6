"""All metrics over a set of images."""

from __future__ import annotations

import math
from typing import Any

from fastris.metrics.average_precision import average_precision_from
from fastris.metrics.dice import foreground_background_dice_from, symmetric_best_dice_from
from fastris.metrics.overlap import LabelMap, overlap


class InstanceMetrics:
    """Collects label maps image by image and reports the mean of each metric over images.

    Attributes:
        rows: one dict an image: name, count, target_count, sbd, dic (signed), map, ap50, fbd.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def update(self, pred: LabelMap, target: LabelMap, name: str | None = None) -> dict[str, Any]:
        """Add one image and return its row.

        Args:
            pred, target: integer label maps (H, W), 0 = background.
            name: the image's name in :attr:`rows`; its index where None.
        """
        counts = overlap(pred, target)
        precision = average_precision_from(counts)
        row = {
            "name": str(len(self.rows)) if name is None else name,
            "count": len(counts.pred_areas),
            "target_count": len(counts.target_areas),
            "sbd": symmetric_best_dice_from(counts),
            "dic": len(counts.pred_areas) - len(counts.target_areas),
            "map": float(precision.mean()),
            "ap50": float(precision[0]),
            "fbd": foreground_background_dice_from(counts),
        }
        self.rows.append(row)
        return row

    def compute(self) -> dict[str, float]:
        """Means over images of sbd, |DiC| (dic), map, ap50 and fbd, NaN without any; and their number."""
        images = len(self.rows)
        means = {
            key: sum(abs(row[key]) for row in self.rows) / images if images else math.nan
            for key in ("sbd", "dic", "map", "ap50", "fbd")
        }
        return {**means, "images": images}

    def reset(self) -> None:
        """Forget all images."""
        self.rows.clear()
