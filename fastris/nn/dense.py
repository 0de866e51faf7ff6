"""What a segmenter's maps are trained to show in every cell: whether it is an object, and where that has its middle.

The steps alone teach the features slowly, as each sees one object.

B = batch, h × w = a map of `stride` pixels a cell.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastris.nn.pointwise import Pointwise


class DenseMaps(NamedTuple):
    """Attributes:
    foreground: (B, h, w) logits: is it an object?
    centre: (B, h, w) logits of 1 in the middle of an object, falling to 0 at its border.
    offset: (B, 2, h, w) x and y from the cell to the middle of its object, in some unit.
    """

    foreground: Tensor
    centre: Tensor
    offset: Tensor


class DenseHead(nn.Module):
    """One 1×1 convolution: (B, channels, h, w) → :class:`DenseMaps`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.read = Pointwise(channels, 4)

    def forward(self, maps: Tensor) -> DenseMaps:
        read = self.read(maps)
        return DenseMaps(read[:, 0], read[:, 1], read[:, 2:])

    def offset_of(self, rows: Tensor) -> Tensor:
        """The offset of some cells, (N, channels) → (N, 2)."""
        assert self.read.bias is not None
        return F.linear(rows, self.read.weight.flatten(1), self.read.bias)[:, 2:]


def dense_targets(labels: Tensor, num_labels: int, unit: float) -> DenseMaps:
    """What the maps should show: of a label map (B, H, W), −1 = void, 0 = background, in every pixel.

    The offsets are in units of so many pixels. The foreground is 0 or 1, and the centre ``exp(−d² / 2(r/3)²)`` of the
    distance d to the middle of an object, whose r is the radius of the disk of its area.
    """
    batch, height, width = labels.shape
    index = labels.clamp_min(0).flatten(1).long()
    y = torch.arange(height, device=labels.device, dtype=torch.float32).view(height, 1).expand(height, width).flatten()
    x = torch.arange(width, device=labels.device, dtype=torch.float32).expand(height, width).flatten()
    values = torch.stack([torch.ones_like(x), x, y]).expand(batch, 3, -1)
    sums = torch.zeros(batch, 3, num_labels + 1, device=labels.device, dtype=torch.float32)
    sums.scatter_add_(2, index.unsqueeze(1).expand(-1, 3, -1), values)
    area = sums[:, :1].clamp_min(1)
    middle = sums[:, 1:] / area
    offset = middle.gather(2, index.unsqueeze(1).expand(-1, 2, -1)) - values[:, 1:]
    squared = offset.square().sum(1)
    spread = area.squeeze(1).gather(1, index) / (torch.pi * 9)
    foreground = (labels > 0).float()
    centre = torch.exp(-squared / (2 * spread)).view_as(foreground) * foreground
    return DenseMaps(foreground, centre, (offset / unit).view(batch, 2, height, width))


def dense_loss(maps: DenseMaps, target: DenseMaps, known: Tensor) -> Tensor:
    """Of each image, (B,): binary cross-entropies of foreground and centre, means over the cells that are ``known``
    (B, h, w), plus the absolute error of the offsets, a mean over the cells of objects."""
    known = known.to(maps.foreground.dtype)
    entropy = F.binary_cross_entropy_with_logits(maps.foreground, target.foreground, reduction="none")
    entropy = entropy + F.binary_cross_entropy_with_logits(maps.centre, target.centre, reduction="none")
    error = (maps.offset - target.offset).abs().sum(1)
    return _mean(entropy, known) + _mean(error, known * target.foreground)


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    """(B, h, w) → (B,), 0 where all weights are."""
    return (values * weights).sum((1, 2)) / weights.sum((1, 2)).clamp_min(1)
