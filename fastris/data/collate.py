"""Samples of different sizes and counts as one padded batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastris.data.sample import VOID, Sample
from fastris.errors import InputError


@dataclass
class Batch:
    """A padded batch.

    Attributes:
        images: float32 (B, 3, H, W) in [0, 1], zero right of and below each image.
        labels: int64 (B, H, W); 0 is background, −1 is void and padding.
        counts: int64 (B,), instances in each image.
        names: the samples' names.
        sizes: (H, W) of each image before padding.
    """

    images: Tensor
    labels: Tensor
    counts: Tensor
    names: list[str]
    sizes: list[tuple[int, int]]

    def __len__(self) -> int:
        return self.images.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch with its tensors on `device`."""
        return replace(
            self,
            images=self.images.to(device, non_blocking=non_blocking),
            labels=self.labels.to(device, non_blocking=non_blocking),
            counts=self.counts.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> Batch:
        """The batch with its tensors in page-locked memory; `DataLoader(pin_memory=True)` calls this."""
        return replace(
            self,
            images=self.images.pin_memory(),
            labels=self.labels.pin_memory(),
            counts=self.counts.pin_memory(),
        )


def collate(samples: Sequence[Sample], multiple: int = 8) -> Batch:
    """Pad samples to a common size, a multiple of `multiple` in both directions: images with zeros, labels with void.

    Raises:
        InputError: no samples, or `multiple` below 1.
    """
    if not samples:
        raise InputError("collate: expected at least one sample, got none")
    if multiple < 1:
        raise InputError(f"collate: multiple must be at least 1, got {multiple}")
    sizes = [sample.size for sample in samples]
    height = -(-max(size[0] for size in sizes) // multiple) * multiple
    width = -(-max(size[1] for size in sizes) // multiple) * multiple
    images = torch.zeros(len(samples), 3, height, width)
    labels = torch.full((len(samples), height, width), VOID, dtype=torch.int64)
    for index, (sample, (rows, columns)) in enumerate(zip(samples, sizes, strict=True)):
        images[index, :, :rows, :columns] = sample.image
        labels[index, :rows, :columns] = sample.labels
    counts = torch.tensor([sample.count for sample in samples], dtype=torch.int64)
    return Batch(images.div_(255), labels, counts, [sample.name for sample in samples], sizes)
