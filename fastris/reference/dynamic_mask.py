"""The mask of an object, drawn by a filter of its own."""

from __future__ import annotations

import torch
from torch import Tensor

WIDTH = 8
"""Channels of detail that the filter sees, and of its inner layer."""


def filter_size(middle: bool) -> int:
    """Numbers of a filter: the first layer (8, inputs) and its bias (8), the second (8) and its bias (1)."""
    return (WIDTH + (6 if middle else 3)) * WIDTH + WIDTH + WIDTH + 1


def dynamic_mask(detail: Tensor, filter: Tensor, centre: Tensor, middle: Tensor | None, radius: float) -> Tensor:
    """Two 1×1 layers, the inner one rectified, over detail and coordinates; each image has its own.

    A pixel shows its 8 channels of detail and its offset from the centre, x, y and x² + y², in units of ``radius``.
    With a middle, detail has two channels more, which lead from the pixel to a point, and the pixel also shows that
    point's offset from the middle.

    Args:
        detail: (B, 8, H, W), or (B, 10, H, W) with ``middle``.
        filter: (B, 105), or (B, 129) with ``middle``: the first layer (8, inputs), its bias (8), the second (8), its
            bias (1).
        centre: (B, 2), x and y in pixels; the first pixel's own are 0.5.
        middle: optional (B, 2), x and y from the centre in units of ``radius``.
        radius: in pixels.

    Returns:
        (B, H, W) logits, in the dtype of ``detail`` and ``filter`` or, under autocast, its own.

    Source: Tian, Shen & Chen, *Conditional Convolutions for Instance Segmentation*, ECCV 2020.
    """
    batch, _, height, width = detail.shape
    offset = (cell_centres(height, width, centre) - centre.unsqueeze(2)) / radius  # [B, 2, HW]
    detail = detail.flatten(2)
    relative = [offset]
    if middle is not None:
        relative.append(offset + detail[:, WIDTH:] - middle.unsqueeze(2))
    relative = [part for one in relative for part in (one, one.square().sum(1, keepdim=True))]
    inputs = WIDTH + 3 * len(relative) // 2
    first, bias, second, last_bias = filter.unsqueeze(2).split((inputs * WIDTH, WIDTH, WIDTH, 1), dim=1)
    first = first.view(batch, WIDTH, inputs)
    inner = torch.baddbmm(bias, first[..., :WIDTH], detail[:, :WIDTH])
    inner = torch.baddbmm(inner, first[..., WIDTH:], torch.cat(relative, dim=1).to(inner.dtype)).relu()
    return torch.baddbmm(last_bias, second.transpose(1, 2), inner).view(batch, height, width)


def cell_centres(height: int, width: int, like: Tensor) -> Tensor:
    """(2, height·width): x and y of the centre of every cell, in cells."""
    y = torch.arange(height, device=like.device, dtype=like.dtype) + 0.5
    x = torch.arange(width, device=like.device, dtype=like.dtype) + 0.5
    return torch.stack([x.expand(height, width), y.unsqueeze(1).expand(height, width)]).flatten(1)
