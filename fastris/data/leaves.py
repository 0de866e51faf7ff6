"""Generated rosettes of overlapping leaves with exact masks."""

from __future__ import annotations

import numpy as np

from fastris.data.dataset import InstanceDataset, check_split
from fastris.data.sample import Sample, relabel, sample_from_arrays
from fastris.errors import InputError

_GOLDEN_ANGLE = np.pi * (3 - np.sqrt(5))
_VALIDATION_STREAM = 1


class LeavesDataset(InstanceDataset):
    """Top views of plants: overlapping leaves around a stem on soil, in the manner of the CVPPP leaf images.

    Needs no files. Sample i depends on `seed`, `split` and i only, so it is the same whatever the length, the
    order of access and the number of workers. Masks are of what is visible, and a plant in which some leaf
    shows less than `min_visible` of itself is drawn again (50 times at most).

    Args:
        length: number of images.
        size: side of the square image in pixels, at least 16.
        num_leaves: fewest and most leaves in an image, both included.
        seed: another seed, other plants.
        split: "train", or "validation" for plants that no other split has; "all" is "train".
        max_instances: lowers the most leaves in an image.
        cache: see :class:`InstanceDataset`.

    Raises:
        InputError: a length below 1, a size below 16, or a range of leaves that is empty or starts below 1.
    """

    min_visible = 0.25

    def __init__(
        self,
        length: int = 100,
        size: int | tuple[int, int] = 64,
        num_leaves: tuple[int, int] = (3, 8),
        seed: int = 0,
        split: str = "train",
        max_instances: int | None = None,
        cache: bool | int = True,
    ) -> None:
        check_split(split)
        if not isinstance(size, int):
            if len(size) != 2 or size[0] != size[1]:
                raise InputError(f"LeavesDataset: size must be one number or a square, got {size}")
            size = size[0]
        fewest, most = num_leaves
        if max_instances is not None:
            fewest, most = min(fewest, max_instances), min(most, max_instances)
        if length < 1 or size < 16:
            raise InputError(f"LeavesDataset: length must be at least 1, size 16, got {length}, {size}")
        if not 1 <= fewest <= most:
            raise InputError(f"LeavesDataset: num_leaves must be (fewest, most) >= 1, got {fewest, most}")
        self.size = size
        self.num_leaves = fewest, most
        self.seed = seed
        self.stream = _VALIDATION_STREAM if split == "validation" else 0
        prefix = "leaves-validation" if split == "validation" else "leaves"
        super().__init__([f"{prefix}-{index:05d}" for index in range(length)], cache)

    def _read(self, index: int) -> Sample:
        random = np.random.default_rng([self.seed, self.stream, index])
        count = int(random.integers(self.num_leaves[0], self.num_leaves[1] + 1))
        image, labels = _draw(random, self.size, count, self.min_visible)
        return sample_from_arrays(image, labels, self.names[index])


def _draw(random: np.random.Generator, size: int, count: int, min_visible: float) -> tuple[np.ndarray, np.ndarray]:
    """One plant: image uint8 (size, size, 3) and labels int32 (size, size) with `count` leaves."""
    grid = (np.arange(size) + 0.5) / size * 2 - 1
    x, y = np.meshgrid(grid, grid)  # both in [-1, 1]
    for _ in range(50):
        image = _soil(random, size)
        labels = np.zeros((size, size), np.int32)
        areas = np.zeros(count + 1)
        stem_x, stem_y = random.uniform(-0.15, 0.15, 2)
        turn = random.uniform(0, 2 * np.pi)
        hue = random.uniform([0.16, 0.4, 0.08], [0.36, 0.66, 0.22])
        for leaf in range(1, count + 1):  # old and long first, young and short on top
            angle = turn + leaf * _GOLDEN_ANGLE + random.normal(0, 0.25)
            length = random.uniform(0.55, 0.85) * (1 - 0.4 * (leaf - 1) / count)
            width = length * random.uniform(0.2, 0.3) * min(1.0, 2.6 / np.sqrt(count))
            along = (x - stem_x) * np.cos(angle) + (y - stem_y) * np.sin(angle)
            across = (y - stem_y) * np.cos(angle) - (x - stem_x) * np.sin(angle)
            position = along / length  # 0 at the stem, 1 at the tip
            bulge = np.clip(1 - ((position - 0.62) / 0.38) ** 2, 0, None)
            blade = np.abs(across) < width * np.sqrt(bulge)
            stalk = (position > 0.02) & (position < 0.4) & (np.abs(across) < max(0.02, 1 / size))
            mask = blade | stalk
            vein = np.abs(across) < max(0.012, 0.5 / size)
            shade = random.uniform(0.75, 1.2) * (0.85 + 0.25 * position + 0.125 * across / width)
            colour = (hue + random.normal(0, 0.02, 3)) * (np.where(vein, 1.25, 1.0) * shade)[..., None]
            rim = mask & (np.abs(across) > 0.8 * width * np.sqrt(bulge)) & blade
            colour[rim] *= 0.8
            image[mask] = colour[mask]
            labels[mask] = leaf
            areas[leaf] = mask.sum()
        visible = np.bincount(labels.reshape(-1), minlength=count + 1)
        if (visible[1:] >= np.maximum(min_visible * areas[1:], 8)).all():
            break
    noisy = image + random.normal(0, 0.02, image.shape)
    return (np.clip(noisy, 0, 1) * 255).round().astype(np.uint8), relabel(labels)


def _soil(random: np.random.Generator, size: int) -> np.ndarray:
    """Brown, blotchy ground, float (size, size, 3) in [0, 1]."""
    coarse = random.random((size // 8 + 2, size // 8 + 2))
    position = np.arange(size) / 8
    low, part = position.astype(int), position % 1
    rows = coarse[low] * (1 - part)[:, None] + coarse[low + 1] * part[:, None]
    blotches = rows[:, low] * (1 - part) + rows[:, low + 1] * part
    brightness = 0.6 + 0.5 * blotches + random.normal(0, 0.08, (size, size))
    return brightness[..., None] * random.uniform([0.22, 0.17, 0.12], [0.36, 0.28, 0.2])
