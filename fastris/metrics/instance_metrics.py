"""All metrics over a set of images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastris.instances import Instances
from fastris.metrics.average_precision import average_precision_from
from fastris.metrics.dice import foreground_background_dice_from, symmetric_best_dice_from
from fastris.metrics.metric import Metric
from fastris.metrics.overlap import LabelMap, overlap
from fastris.metrics.region import AveragePrecisionRegion


class InstanceMetrics(Metric):
    """The mean of each metric over images, and AP^r over the data set.

    Attributes:
        rows: one dict an image: name, count, target_count, sbd, dic (signed), map, ap50, fbd.
    """

    def reset(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self._region = AveragePrecisionRegion(sync_on_compute=False)

    def update(self, pred: Instances | LabelMap, target: LabelMap, name: str | None = None) -> dict[str, Any]:
        """Add one image and return its row.

        Args:
            pred: instances with scores: AP^r takes their masks as they are, the other metrics their label map. Or an
                integer label map (H, W), 0 = background, which is to AP^r detections that all have one score.
            target: integer label map (H, W), 0 = background, −1 = void.
            name: the image's name in :attr:`rows`; its index where None.

        Raises:
            InputError: not an integer (H, W) label map, an id below −1, or two different shapes.
        """
        labels = pred.label_map() if isinstance(pred, Instances) else pred
        counts = overlap(labels, target)
        if isinstance(pred, Instances):
            self._region.update(pred, target)
        else:
            self._region.update_from(counts)
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

    def state_dict(self) -> dict[str, Any]:
        return {"rows": [dict(row) for row in self.rows], "region": self._region.state_dict()}

    def _merge(self, state: Mapping[str, Any]) -> None:
        self._region.merge_state(state["region"])
        self.rows += state["rows"]

    def _value(self) -> dict[str, float]:
        """Means over images of sbd, fbd, |DiC| (dic), DiC (signed_dic), map and ap50; AP^r; the number of images.

        All but the number are NaN without any image.
        """
        return {
            **{key: self._mean([row[key] for row in self.rows]) for key in ("sbd", "fbd", "map", "ap50")},
            "dic": self._mean([abs(row["dic"]) for row in self.rows]),
            "signed_dic": self._mean([row["dic"] for row in self.rows]),
            **self._region.compute(),
            "images": len(self.rows),
        }

    @staticmethod
    def _mean(values: list[float]) -> float:
        """Rounded once, so that the order of images does not show."""
        return math.fsum(values) / len(values) if values else math.nan
