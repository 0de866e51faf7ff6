"""The result of a prediction: the instances of one image in order of finding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastris.errors import InputError

if TYPE_CHECKING:
    from PIL import Image


@dataclass
class Instances:
    """The instances of one image, in order of finding.

    Attributes:
        masks: bool (N, H, W); two masks may share pixels.
        scores: float32 (N,), the confidence in [0, 1] that each is an instance.
        size: (H, W) in pixels.
        name: the image's file or id, or "".
    """

    masks: np.ndarray
    scores: np.ndarray
    size: tuple[int, int]
    name: str = ""

    def __post_init__(self) -> None:
        self.masks = np.asarray(self.masks, dtype=bool)
        self.scores = np.asarray(self.scores, dtype=np.float32)
        self.size = (int(self.size[0]), int(self.size[1]))
        if self.masks.shape != (len(self.scores), *self.size):
            raise InputError(
                f"Instances: expected masks (N, H, W) = {(len(self.scores), *self.size)}, got {self.masks.shape}"
            )

    @classmethod
    def from_label_map(cls, labels: np.ndarray, name: str = "") -> Instances:
        """The instances of an integer label map (H, W), 0 = background, in order of id, each with score 1."""
        labels = np.asarray(labels)
        ids = np.unique(labels)
        ids = ids[ids > 0]
        return cls(labels[None] == ids[:, None, None], np.ones(len(ids), np.float32), labels.shape[-2:], name)

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        name = f", name={self.name!r}" if self.name else ""
        return f"Instances({len(self)} in {self.size[0]} × {self.size[1]} pixels{name})"

    @property
    def areas(self) -> np.ndarray:
        """int64 (N,), pixels of each mask."""
        return np.array([np.count_nonzero(mask) for mask in self.masks], dtype=np.int64)

    @property
    def boxes(self) -> np.ndarray:
        """float32 (N, 4), x0, y0, x1, y1 in pixels, right and bottom exclusive; zeros for an empty mask."""
        boxes = np.zeros((len(self), 4), np.float32)
        for box, mask in zip(boxes, self.masks, strict=True):
            rows = np.flatnonzero(mask.any(axis=1))
            if rows.size:
                columns = np.flatnonzero(mask[rows[0] : rows[-1] + 1].any(axis=0))
                box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        return boxes

    def label_map(self) -> np.ndarray:
        """int32 (H, W): k where the k-th instance found is, 0 = background; where two overlap the earlier wins."""
        labels = np.zeros(self.size, np.int32)
        for k in range(len(self), 0, -1):
            labels[self.masks[k - 1]] = k
        return labels

    def resize(self, size: tuple[int, int]) -> Instances:
        """The same instances on an image of another size (H, W), by nearest neighbour."""
        rows = np.arange(size[0]) * self.size[0] // size[0]
        columns = np.arange(size[1]) * self.size[1] // size[1]
        masks = np.empty((len(self), *size), bool)
        for out, mask in zip(masks, self.masks, strict=True):
            np.take(mask[:, columns], rows, axis=0, out=out)
        return Instances(masks, self.scores, size, self.name)

    def to_rows(self) -> list[dict[str, Any]]:
        """One JSON-able dict an instance: index (from 1, in order of finding), score, area, box."""
        return [
            {"index": k, "score": round(float(score), 4), "area": int(area), "box": [int(edge) for edge in box]}
            for k, (score, area, box) in enumerate(zip(self.scores, self.areas, self.boxes, strict=True), 1)
        ]

    def summary(self) -> dict[str, Any]:
        """A JSON-able dict: file, height, width, count, instances (:meth:`to_rows`)."""
        height, width = self.size
        return {"file": self.name, "height": height, "width": width, "count": len(self), "instances": self.to_rows()}

    def to_coco(self, image_id: int = 0, category_id: int = 1) -> list[dict[str, Any]]:
        """COCO results, JSON-able: compressed RLE segmentation, area, bbox (x, y, width, height) and score each.

        Raises:
            InputError: pycocotools is not installed.
        """
        encode = require_pycocotools().encode
        canvas = np.zeros(self.size, np.uint8, order="F")  # COCO counts along columns; only the box is transposed
        results = []
        for mask, score, area, (x0, y0, x1, y1) in zip(
            self.masks, self.scores, self.areas, self.boxes.tolist(), strict=True
        ):
            box = slice(int(y0), int(y1)), slice(int(x0), int(x1))
            canvas[box] = mask[box]
            rle = encode(canvas)
            canvas[box] = 0
            results.append(
                {
                    "image_id": image_id,
                    "category_id": category_id,
                    "segmentation": {"size": list(self.size), "counts": rle["counts"].decode("ascii")},
                    "area": int(area),
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "score": float(score),
                }
            )
        return results

    def plot(self, image: Any = None) -> Image.Image:
        """The instances drawn over the image, see :func:`fastris.viz.overlay`.

        Args:
            image: an (H, W, 3) or (H, W) uint8 array, a (3, H, W) tensor, a PIL image or a path; where not given, the
                file that :attr:`name` is, or black.
        """
        from pathlib import Path

        from fastris.viz import overlay

        if image is None:
            image = self.name if self.name and Path(self.name).is_file() else np.zeros(self.size, np.uint8)
        return overlay(image, self)


def require_pycocotools() -> Any:
    """The module ``pycocotools.mask``.

    Raises:
        InputError: it is not installed; the message says how to install it.
    """
    try:
        from pycocotools import mask
    except ImportError:
        raise InputError(
            "COCO masks need pycocotools, which is not installed: pip install 'fastris[coco]' or pycocotools"
        ) from None
    return mask
