"""Masks of an image's pixels from the logits of a map's cells."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def image_masks(logits: Tensor, stride: int, offset: int, size: tuple[int, int], void: Tensor | None = None) -> Tensor:
    """The sigmoid of what :func:`at_pixels` makes of logits.

    Args:
        logits: (B, T, h, w).
        stride, offset, size: as of :func:`at_pixels`.
        void: optional bool (B, H, W), pixels whose masks are 0 and carry no gradient.

    Returns:
        (B, T, H, W).
    """
    masks = at_pixels(logits, stride, offset, size).sigmoid()
    return masks if void is None else torch.where(void.unsqueeze(1), 0.0, masks)


def at_pixels(maps: Tensor, stride: int, offset: int, size: tuple[int, int]) -> Tensor:
    """What maps are at the pixels of an image, bilinearly.

    Args:
        maps: (B, C, h, w).
        stride: pixels a cell is wide.
        offset: pixels by which the maps begin above and left of the image.
        size: (H, W) of the image, which they cover.

    Returns:
        (B, C, H, W).
    """
    height, width = size
    grown = maps if stride == 1 else F.interpolate(maps, scale_factor=stride, mode="bilinear")
    return grown[..., offset : offset + height, offset : offset + width]
