"""1×1 convolutions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Pointwise(nn.Conv2d):
    """A 1×1 convolution as a matrix product over the channels of each cell; (B, in, H, W) → (B, out, H, W).

    Of maps in channels_last it gives such maps, forward and backward, without a copy. torch's own convolution gives
    gradients in NCHW on the CPU, and adding those to others takes ten times as long as where both are alike.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, maps: Tensor) -> Tensor:
        return F.linear(maps.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)
