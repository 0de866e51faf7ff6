"""COCO's average precision and recall of masks, by pycocotools."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastris.errors import InputError
from fastris.instances import Instances, require_pycocotools
from fastris.metrics.metric import Metric
from fastris.metrics.overlap import VOID, LabelMap, as_label_map

KEYS = (
    *("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
    *("ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large"),
)  # in the order of COCOeval.stats
CATEGORIES = [{"id": 1, "name": "object"}]


class CocoMetrics(Metric):
    """The twelve numbers of COCO's evaluation of masks, for one category.

    They are `COCOeval`'s own, with its parameters: the 100 best detections of an image, IoU 0.50, 0.55, … 0.95,
    precision at 101 recalls. Void is a crowd region, COCO's own way of leaving pixels out: a detection of which at
    least the threshold's share lies in it, and that matches no target, is ignored. Unlike in the other metrics, its
    pixels stay in the masks.

    Raises:
        InputError: pycocotools is not installed; in the constructor.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        require_pycocotools()
        super().__init__(*args, **options)

    def reset(self) -> None:
        self._images: list[dict[str, Any]] = []

    def update(self, pred: Instances, target: LabelMap, name: str | None = None) -> None:
        """Add one image.

        Args:
            pred: the instances, with scores; their masks may overlap.
            target: integer label map (H, W), 0 = background, −1 = void.
            name: the image's file name in :meth:`ground_truth`, where images are ordered by it.

        Raises:
            InputError: not an integer (H, W) label map, an id below −1, or another size than the prediction's.
        """
        labels = as_label_map(target, "target")
        if labels.shape != pred.size:
            raise InputError(f"pred and target must have the same shape, got {pred.size} and {labels.shape}")
        void = Instances(labels[None] == VOID, np.ones(1), labels.shape)
        self._images.append(
            {
                "file_name": str(len(self._images)) if name is None else name,
                "height": labels.shape[0],
                "width": labels.shape[1],
                "targets": [{**one, "iscrowd": 0} for one in Instances.from_label_map(labels).to_coco()]
                + [{**one, "iscrowd": 1} for one in void.to_coco() if one["area"]],
                "detections": pred.to_coco(),
            }
        )

    def ground_truth(self) -> dict[str, Any]:
        """The targets as a COCO data set, JSON-able: images, categories, annotations."""
        return {**self._header(), "annotations": self._annotations("targets", ("area", "bbox", "iscrowd"))}

    def results(self) -> list[dict[str, Any]]:
        """The detections in COCO's results format, JSON-able: image_id, category_id, segmentation, score."""
        wanted = ("image_id", "category_id", "segmentation", "score")
        return [{key: one[key] for key in wanted} for one in self._annotations("detections", ("score",))]

    def state_dict(self) -> dict[str, Any]:
        return {"images": list(self._images)}

    def _merge(self, state: Mapping[str, Any]) -> None:
        self._images += state["images"]

    def _value(self) -> dict[str, float]:
        """ap, ap50, ap75, ap_small/medium/large, ar1, ar10, ar100, ar_small/medium/large; NaN where there is no target.

        Small is below 32² pixels, large above 96².
        """
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        if not self._images:
            return dict.fromkeys(KEYS, math.nan)
        truth, found = COCO(), COCO()
        truth.dataset = self.ground_truth()
        found.dataset = {**self._header(), "annotations": self._annotations("detections", ("area", "bbox", "score"))}
        with contextlib.redirect_stdout(io.StringIO()):  # its progress and its table
            truth.createIndex()
            found.createIndex()
            evaluation = COCOeval(truth, found, "segm")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return {
            key: float(value) if value >= 0 else math.nan for key, value in zip(KEYS, evaluation.stats, strict=True)
        }

    def _ordered(self) -> list[dict[str, Any]]:
        """By name, so that ids, and ranks of equal scores, do not depend on the order of images."""
        return sorted(self._images, key=lambda image: image["file_name"])

    def _header(self) -> dict[str, Any]:
        images = [
            {"id": image_id, **{key: image[key] for key in ("file_name", "height", "width")}}
            for image_id, image in enumerate(self._ordered(), 1)
        ]
        return {"images": images, "categories": CATEGORIES}

    def _annotations(self, kind: str, keys: tuple[str, ...]) -> list[dict[str, Any]]:
        """Fresh dicts, as pycocotools writes into them; numbered from 1, as 0 means "no match" to it."""
        chosen = ("category_id", "segmentation", *keys)
        found = [
            {"image_id": image_id, **{key: one[key] for key in chosen}}
            for image_id, image in enumerate(self._ordered(), 1)
            for one in image[kind]
        ]
        return [{"id": number, **one} for number, one in enumerate(found, 1)]
