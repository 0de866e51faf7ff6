"""What the data sets share whose images come with one label map each."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np

from fastris.data.dataset import InstanceDataset
from fastris.data.sample import Sample, sample_from_arrays
from fastris.errors import InputError


class LabelMapDataset(InstanceDataset):
    """Images and, from somewhere, their label maps.

    Args:
        names: the images' names, each once.
        cache: see :class:`InstanceDataset`.
        max_instances, min_instances: keep only images with at most, at least this many instances.
        size: keep only images of this (H, W) in pixels.

    An image whose labels cannot be read is kept: asking for it says why.
    """

    def __init__(
        self,
        names: list[str],
        cache: bool | int = True,
        max_instances: int | None = None,
        size: tuple[int, int] | None = None,
        min_instances: int = 0,
    ) -> None:
        if max_instances is not None or size is not None or min_instances > 0:
            most = np.inf if max_instances is None else max_instances
            kept = []
            for name in names:
                try:
                    count, shape = self._count_and_size(name)
                except InputError:
                    kept.append(name)
                    continue
                if min_instances <= count <= most and (size is None or shape == tuple(size)):
                    kept.append(name)
            names = kept
        super().__init__(names, cache)

    def _image_path(self, name: str) -> Path:
        """The image file."""
        raise NotImplementedError

    def _label_path(self, name: str) -> Path:
        """The file that holds the labels; errors name it."""
        raise NotImplementedError

    def _labels(self, name: str) -> np.ndarray:
        """Instance ids, integers (H, W), 0 = background, negative = void."""
        raise NotImplementedError

    def _count_and_size(self, name: str) -> tuple[int, tuple[int, int]]:
        """The number of instances and (H, W), from the labels alone."""
        labels = self._labels(name)
        return np.unique(labels[labels > 0]).size, (labels.shape[0], labels.shape[1])

    def _read(self, index: int) -> Sample:
        from fastris.imageio import read_image

        name = self.names[index]
        labels = self._labels(name)
        image = read_image(self._image_path(name))
        check_same_size(self._label_path(name), labels, image, "its image")
        return sample_from_arrays(image, labels, name)


def check_same_size(path: Path, labels: np.ndarray, other: np.ndarray, what: str) -> None:
    """Raise InputError, naming the label map's file, unless labels (H, W) and another picture have the same size."""
    if labels.shape != other.shape[:2]:
        sizes = f"{labels.shape[1]}x{labels.shape[0]} pixels, {what} {other.shape[1]}x{other.shape[0]}"
        raise InputError(f"{path}: label map is {sizes}")


def check_class(data_class: str | None, known: Collection[str]) -> None:
    """Raise InputError unless `data_class` is None or one of `known`."""
    if data_class is not None and data_class not in known:
        raise InputError(f"data_class: expected one of {', '.join(known)}, got {data_class!r}")
