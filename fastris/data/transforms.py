"""Random transforms of image and labels together, each a function of the sample and a generator's state.

What a crop or a rotation brings in from outside the image is black in the image and void in the labels.

The work is NumPy's and Pillow's: at these sizes, waking PyTorch's threads costs more than the arithmetic,
far more where others hold the cores. A crop of 128x128, a flip, a quarter turn and an intensity change
together take about 0.5 ms on one core.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from fastris.data.sample import VOID, Sample, relabel
from fastris.errors import InputError

Transform = Callable[[Sample, torch.Generator], Sample]

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
MIN_AREA = 8  # pixels: what a crop or a rotation leaves of an instance below this is background


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()


def _integer(high: int, generator: torch.Generator) -> int:
    """Uniform in 0..high - 1."""
    return int(torch.randint(high, (), generator=generator))


def _visible(labels: np.ndarray, min_area: int) -> int:
    """How many instances have at least `min_area` pixels in `labels`."""
    areas = np.bincount(labels.reshape(-1) - VOID)  # of void, background, 1, 2 …
    return int(np.count_nonzero(areas[2:] >= min_area))


def _window(sample: Sample, top: int, left: int, height: int, width: int, min_area: int) -> Sample:
    """The part of a sample inside a window, void beyond the image, with its instances numbered anew."""
    image = np.zeros((3, height, width), np.uint8)
    labels = np.full((height, width), VOID, np.int32)
    view = sample.labels[top : top + height, left : left + width].numpy()
    rows, columns = view.shape
    image[:, :rows, :columns] = sample.image[:, top : top + height, left : left + width].numpy()
    labels[:rows, :columns] = relabel(view, min_area)
    return _sample(image, labels, sample.name)


def _sample(image: np.ndarray, labels: np.ndarray, name: str) -> Sample:
    return Sample(torch.from_numpy(np.ascontiguousarray(image)), torch.from_numpy(np.ascontiguousarray(labels)), name)


class Compose:
    """Transforms applied one after the other."""

    def __init__(self, transforms: Sequence[Transform]) -> None:
        self.transforms = list(transforms)

    def __call__(self, sample: Sample, generator: torch.Generator) -> Sample:
        for transform in self.transforms:
            sample = transform(sample, generator)
        return sample


class RandomCrop:
    """A window of a fixed size at a random place, with few enough instances in it.

    Up to `tries` windows are drawn until one shows between `min_instances` and `max_instances` instances. If
    none does, the one that misses by least is taken; where that one still shows too many,
    :func:`limit_instances` narrows the view to a smaller window, which is enlarged (image bilinear, labels nearest)
    by a random amount, from none to what fills `size`, and padded. So the limit always holds, and crowded images are
    seen at their own scale as well as at larger ones. `min_instances` is a wish: an image may have none.

    An image smaller than `size` is padded at the right and below, as :func:`fastris.data.collate` pads.

    Args:
        size: pixels, (height, width) or one number for both.
        zoom: scale the window by a random factor, log-uniform between 1/zoom and zoom, but not further down than there
            is image to see; 1 for none.
        max_instances: the most instances a crop may show; None for no limit.
        min_instances: the fewest that a crop should show.
        tries: windows to draw before settling for less.
        min_area: an instance with fewer pixels than this left in the window becomes background.
    """

    def __init__(
        self,
        size: int | tuple[int, int],
        max_instances: int | None = None,
        min_instances: int = 1,
        tries: int = 10,
        min_area: int = MIN_AREA,
        zoom: float = 1.0,
    ) -> None:
        self.size = (size, size) if isinstance(size, int) else (size[0], size[1])
        if not 1 <= zoom < math.inf:
            raise InputError(f"RandomCrop: zoom must be a number from 1, got {zoom}")
        self.zoom = zoom
        if min(self.size) < 1 or tries < 1 or min_area < 1:
            raise InputError(f"RandomCrop: size, tries and min_area must be positive, got {size}, {tries}, {min_area}")
        if max_instances is not None and max_instances < max(1, min_instances):
            raise InputError(f"RandomCrop: max_instances must be at least 1 and min_instances, got {max_instances}")
        self.max_instances = max_instances
        self.min_instances = min_instances
        self.tries = tries
        self.min_area = min_area

    def __call__(self, sample: Sample, generator: torch.Generator) -> Sample:
        rows, columns = sample.size
        height, width = self._window_size(rows, columns, generator)
        labels = sample.labels.numpy()
        most = math.inf if self.max_instances is None else self.max_instances
        best, best_miss = (0, 0), math.inf
        for _ in range(self.tries):
            top = _integer(max(rows - height, 0) + 1, generator)
            left = _integer(max(columns - width, 0) + 1, generator)
            count = _visible(labels[top : top + height, left : left + width], self.min_area)
            miss = max(count - most, self.min_instances - count, 0)
            if miss < best_miss:
                best, best_miss = (top, left), miss
            if miss == 0:
                break
        crop = _window(sample, *best, height, width, self.min_area)
        if self.max_instances is None or crop.count <= self.max_instances:
            if (height, width) == self.size:
                return crop
            return _window(_resize(crop, self.size), 0, 0, *self.size, self.min_area)
        narrow = limit_instances(crop, self.max_instances, generator, self.min_area)
        share = _uniform(0, 1, generator)
        enlarged = [round(side + share * (most - side)) for side, most in zip(narrow.size, self.size, strict=True)]
        return _window(_resize(narrow, (enlarged[0], enlarged[1])), 0, 0, *self.size, self.min_area)

    def _window_size(self, rows: int, columns: int, generator: torch.Generator) -> tuple[int, int]:
        """How much of an image of rows × columns to look at."""
        height, width = self.size
        if self.zoom == 1:
            return height, width
        factor = math.exp(_uniform(-math.log(self.zoom), math.log(self.zoom), generator))
        factor = max(factor, min(1, max(height / rows, width / columns)))
        return max(1, round(height / factor)), max(1, round(width / factor))


def limit_instances(sample: Sample, n: int, generator: torch.Generator, min_area: int = MIN_AREA) -> Sample:
    """Narrow the view until at most `n` instances are visible.

    The window keeps the sample's shape and is centred, as far as the border allows, on the middle pixel of a
    random instance. Its side is the largest of the sample's sides times 0.9, 0.9², … at which at most `n`
    instances have `min_area` pixels or more in it, so the view shows about `n`. The result
    is smaller than the sample; a sample with `n` or fewer instances is returned as it is.

    Raises:
        InputError: `n` below 1.
    """
    if n < 1:
        raise InputError(f"limit_instances: n must be at least 1, got {n}")
    count = sample.count
    if count <= n:
        return sample
    labels = sample.labels.numpy()
    rows, columns = sample.size
    inside = np.argwhere(labels == 1 + _integer(count, generator))
    row, column = inside[np.square(inside - inside.mean(0)).sum(1).argmin()].tolist()
    height, width = rows, columns
    scale = 1.0
    while True:  # ends: n + 1 instances need (n + 1) * min_area pixels
        scale *= 0.9
        height, width = max(1, round(rows * scale)), max(1, round(columns * scale))
        top = min(max(row - height // 2, 0), rows - height)
        left = min(max(column - width // 2, 0), columns - width)
        if _visible(labels[top : top + height, left : left + width], min_area) <= n:
            return _window(sample, top, left, height, width, min_area)


def _resize(sample: Sample, size: tuple[int, int]) -> Sample:
    """Scale a sample, image bilinear, labels nearest: enlarged, every source pixel is sampled, so none vanishes."""
    from PIL import Image

    rows, columns = sample.size
    scaled = Image.fromarray(sample.image.permute(1, 2, 0).numpy()).resize(size[::-1], Image.Resampling.BILINEAR)
    row, column = np.arange(size[0]) * rows // size[0], np.arange(size[1]) * columns // size[1]
    return _sample(np.asarray(scaled).transpose(2, 0, 1).copy(), sample.labels.numpy()[row][:, column], sample.name)


class Fit:
    """The whole image scaled so that it just fits into a size, with void right of it and below.

    Args:
        size: pixels, (height, width).
        min_area: an instance with fewer pixels than this left becomes background.
    """

    def __init__(self, size: tuple[int, int], min_area: int = MIN_AREA) -> None:
        self.size = size
        self.min_area = min_area

    def __call__(self, sample: Sample, generator: torch.Generator) -> Sample:
        scale = min(self.size[0] / sample.size[0], self.size[1] / sample.size[1])
        rows, columns = (max(1, round(side * scale)) for side in sample.size)
        if (rows, columns) != sample.size:
            sample = _resize(sample, (rows, columns))
        return _window(sample, 0, 0, *self.size, self.min_area)


class RandomFlip:
    """Left-right and up-down, each with probability one half.

    Args:
        vertical: whether up-down is to be had.
    """

    def __init__(self, vertical: bool = True) -> None:
        self.vertical = vertical

    def __call__(self, sample: Sample, generator: torch.Generator) -> Sample:
        which = _integer(4, generator)
        axes = tuple(axis for bit, axis in ((1, -1), (2, -2)) if which & bit and (axis == -1 or self.vertical))
        if not axes:
            return sample
        return _sample(np.flip(sample.image.numpy(), axes), np.flip(sample.labels.numpy(), axes), sample.name)


class RandomRotation:
    """Rotation by a random angle about the centre.

    Args:
        degrees: None for a multiple of 90 degrees, which loses nothing; else the angle is uniform in
            ±`degrees`, the image is sampled bilinearly and the labels by nearest neighbour, and the size stays.
        min_area: with an angle, an instance with fewer pixels than this left becomes background.
    """

    def __init__(self, degrees: float | None = None, min_area: int = MIN_AREA) -> None:
        if degrees is not None and not 0 <= degrees <= 180:
            raise InputError(f"RandomRotation: degrees must be None or in [0, 180], got {degrees}")
        self.degrees = degrees
        self.min_area = min_area

    def __call__(self, sample: Sample, generator: torch.Generator) -> Sample:
        if self.degrees is None:
            turns = _integer(4, generator)
            if turns == 0:
                return sample
            quarter = np.rot90(sample.image.numpy(), turns, (-2, -1))
            return _sample(quarter, np.rot90(sample.labels.numpy(), turns), sample.name)
        from PIL import Image

        angle = math.radians(_uniform(-self.degrees, self.degrees, generator))
        rows, columns = sample.size
        cosine, sine = math.cos(angle), math.sin(angle)
        # From a pixel of the result to its source, x before y, both about the centre.
        middle_x, middle_y = columns / 2, rows / 2
        source = (
            *(cosine, -sine, middle_x - cosine * middle_x + sine * middle_y),
            *(sine, cosine, middle_y - sine * middle_x - cosine * middle_y),
        )
        affine, size = Image.Transform.AFFINE, (columns, rows)
        image = Image.fromarray(sample.image.permute(1, 2, 0).numpy())
        turned = np.asarray(image.transform(size, affine, source, Image.Resampling.BILINEAR))
        labels = Image.fromarray(sample.labels.numpy())
        numbered = np.asarray(labels.transform(size, affine, source, Image.Resampling.NEAREST, fillcolor=VOID))
        return _sample(turned.transpose(2, 0, 1).copy(), relabel(numbered, self.min_area), sample.name)


class IntensityJitter:
    """Random brightness, contrast, gamma, inversion and greying of the image; labels stay.

    With x in [0, 1]: x to the power exp(u), u in ±`gamma`; then contrast about the image's mean by a factor
    in 1 ± `contrast`; then plus a number in ±`brightness`; then clipped.

    Args:
        brightness, contrast, gamma: half widths of the ranges above.
        invert_probability: how often dark and bright change places.
        grey_probability: how often the colours become their luma (0.299, 0.587, 0.114).
    """

    def __init__(
        self,
        brightness: float = 0.1,
        contrast: float = 0.2,
        gamma: float = 0.2,
        invert_probability: float = 0.0,
        grey_probability: float = 0.0,
    ) -> None:
        self.brightness = brightness
        self.contrast = contrast
        self.gamma = gamma
        self.invert_probability = invert_probability
        self.grey_probability = grey_probability

    def __call__(self, sample: Sample, generator: torch.Generator) -> Sample:
        exponent = math.exp(_uniform(-self.gamma, self.gamma, generator))
        factor = 1 + _uniform(-self.contrast, self.contrast, generator)
        shift = _uniform(-self.brightness, self.brightness, generator)
        invert = _uniform(0, 1, generator) < self.invert_probability
        grey = _uniform(0, 1, generator) < self.grey_probability
        pixels = sample.image.numpy()
        if grey:
            pixels = np.tensordot(_LUMA, pixels, 1).round().astype(np.uint8)
        table = np.linspace(0, 1, 256) ** exponent
        histogram = np.bincount(pixels.reshape(-1), minlength=256)
        mean = float(histogram @ table) / pixels.size
        table = np.clip((table - mean) * factor + mean + shift, 0, 1)
        if invert:
            table = 1 - table
        out = np.take(np.round(table * 255).astype(np.uint8), pixels)
        if grey:
            out = np.repeat(out[None], 3, axis=0)
        return Sample(torch.from_numpy(out), sample.labels, sample.name)
