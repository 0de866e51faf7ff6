"""The result of a prediction: the instances of one image in order of finding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastris.crop import Crop
from fastris.errors import InputError

if TYPE_CHECKING:
    from PIL import Image


@dataclass(init=False, eq=False, repr=False)
class Instances:
    """The instances of one image, in order of finding.

    Masks are kept cropped to their boxes, so that memory follows the objects, not their number times the image.
    ``instances[k]``, a slice, or a bool or integer array choose among them (``found[found.scores > 0.9]``); iterating
    gives one instance a time.

    Attributes:
        crops: each mask cropped to its box.
        scores: float32 (N,), the confidence in [0, 1] that each is an instance.
        size: (H, W) in pixels.
        name: the image's file or id, or "".
        warnings: what may be wrong with this result, a sentence each.
    """

    crops: list[Crop]
    scores: np.ndarray
    size: tuple[int, int]
    name: str
    warnings: tuple[str, ...]

    def __init__(
        self,
        masks: Any,
        scores: np.ndarray,
        size: tuple[int, int],
        name: str = "",
        warnings: tuple[str, ...] = (),
    ) -> None:
        """As the attributes; `masks` are bool (N, H, W), or a list of N crops. Two masks may share pixels."""
        self.scores = np.asarray(scores, dtype=np.float32)
        self.size = (int(size[0]), int(size[1]))
        self.name = name
        self.warnings = warnings
        if not (isinstance(masks, list) and all(isinstance(one, Crop) for one in masks)):
            masks = np.asarray(masks, dtype=bool)
            if masks.shape[1:] != self.size:
                raise InputError(
                    f"Instances: expected masks (N, H, W) = {(len(self.scores), *self.size)}, got {masks.shape}"
                )
            masks = [Crop.of(mask) for mask in masks]
        if len(masks) != len(self.scores):
            raise InputError(f"Instances: expected a mask for each of {len(self.scores)} scores, got {len(masks)}")
        self.crops = masks

    @classmethod
    def from_label_map(cls, labels: np.ndarray, name: str = "") -> Instances:
        """The instances of an integer label map (H, W), 0 = background, in order of id, each with score 1."""
        from scipy.ndimage import find_objects

        labels = np.asarray(labels)
        ids = np.where(labels > 0, labels, 0).astype(np.int64)
        if ids.max(initial=0) > 4 * ids.size:  # far apart: numbered anew, as find_objects gives a place to every number
            ids = np.unique(np.append(0, ids), return_inverse=True)[1][1:].reshape(labels.shape)
        places = find_objects(ids) if ids.any() else []
        crops = [Crop.of(ids[at] == k, at[0].start, at[1].start) for k, at in enumerate(places, 1) if at]
        return cls(crops, np.ones(len(crops), np.float32), labels.shape, name)

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, chosen: int | slice | Sequence[int] | np.ndarray) -> Instances:
        """Some of the instances; of one, for a whole number."""
        indices = np.atleast_1d(np.arange(len(self))[chosen])
        return Instances([self.crops[k] for k in indices], self.scores[indices], self.size, self.name, self.warnings)

    def __iter__(self) -> Iterator[Instances]:
        return (self[k] for k in range(len(self)))

    def __repr__(self) -> str:
        name = f", name={self.name!r}" if self.name else ""
        return f"Instances({len(self)} in {self.size[0]} × {self.size[1]} pixels{name})"

    @property
    def masks(self) -> np.ndarray:
        """bool (N, H, W), made anew at each access: N·H·W bytes, which for a large image :attr:`crops` avoid."""
        masks = np.zeros((len(self), *self.size), bool)
        for mask, crop in zip(masks, self.crops, strict=True):
            mask[crop.box.slices] = crop.mask
        return masks

    @property
    def areas(self) -> np.ndarray:
        """int64 (N,), pixels of each mask."""
        return np.array([crop.area for crop in self.crops], dtype=np.int64)

    @property
    def boxes(self) -> np.ndarray:
        """float32 (N, 4), x0, y0, x1, y1 in pixels, right and bottom exclusive; zeros for an empty mask."""
        corners = [(box.left, box.top, box.right, box.bottom) for box, _ in self.crops]
        return np.array(corners, dtype=np.float32).reshape(-1, 4)

    def label_map(self) -> np.ndarray:
        """int32 (H, W): k where the k-th instance found is, 0 = background; where two overlap the earlier wins."""
        labels = np.zeros(self.size, np.int32)
        for k in range(len(self), 0, -1):
            box, mask = self.crops[k - 1]
            labels[box.slices][mask] = k
        return labels

    def resize(self, size: tuple[int, int]) -> Instances:
        """The same instances on an image of another size (H, W), by nearest neighbour."""
        rows = np.arange(size[0]) * self.size[0] // size[0]
        columns = np.arange(size[1]) * self.size[1] // size[1]
        crops = []
        for box, mask in self.crops:
            top, bottom = np.searchsorted(rows, (box.top, box.bottom))
            left, right = np.searchsorted(columns, (box.left, box.right))
            sampled = mask[rows[top:bottom, None] - box.top, columns[left:right] - box.left]
            crops.append(Crop.of(sampled, int(top), int(left)))
        return Instances(crops, self.scores, size, self.name, self.warnings)

    def to_rows(self) -> list[dict[str, Any]]:
        """One JSON-able dict an instance: index (from 1, in order of finding), score, area, box."""
        return [
            {"index": k, "score": round(float(score), 4), "area": int(area), "box": [int(edge) for edge in box]}
            for k, (score, area, box) in enumerate(zip(self.scores, self.areas, self.boxes, strict=True), 1)
        ]

    def summary(self) -> dict[str, Any]:
        """A JSON-able dict: file, height, width, count, warnings, instances (:meth:`to_rows`)."""
        height, width = self.size
        return {
            "file": self.name,
            "height": height,
            "width": width,
            "count": len(self),
            "warnings": list(self.warnings),
            "instances": self.to_rows(),
        }

    def to_coco(self, image_id: int = 0, category_id: int = 1) -> list[dict[str, Any]]:
        """COCO results, JSON-able: compressed RLE segmentation, area, bbox (x, y, width, height) and score each.

        Raises:
            InputError: pycocotools is not installed.
        """
        encode = require_pycocotools().encode
        canvas = np.zeros(self.size, np.uint8, order="F")  # COCO counts along columns; only the box is transposed
        results = []
        for crop, score, area, (x0, y0, x1, y1) in zip(
            self.crops, self.scores, self.areas, self.boxes.tolist(), strict=True
        ):
            canvas[crop.box.slices] = crop.mask
            rle = encode(canvas)
            canvas[crop.box.slices] = 0
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
