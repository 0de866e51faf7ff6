"""Fully convolutional feature networks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastris.nn.pointwise import Pointwise
from fastris.ops.conv2d_same import conv2d_same
from fastris.ops.group_norm_relu import group_norm_relu


class _SameConv2d(nn.Conv2d):
    """3×3, stride 1, by :func:`~fastris.ops.conv2d_same.conv2d_same`."""

    def forward(self, x: Tensor) -> Tensor:
        return conv2d_same(x, self.weight)


class _GroupNormReLU(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return group_norm_relu(x, self.weight, self.bias, self.num_groups, self.eps)


def _conv_block(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d if stride > 1 else _SameConv2d
    return nn.Sequential(
        conv(in_channels, out_channels, 3, stride=stride, padding=1, bias=False),
        _GroupNormReLU(8, out_channels),
    )


class Backbone(nn.Module):
    """What the segmenter asks of a feature network.

    Attributes:
        stride: pixels per cell of the features.
        detail_stride: pixels per cell of the detail.
        channels: of the features.
        detail_channels: of the detail.
        multiple: the sides of an image must be multiples of this; the segmenter pads with zeros, right and below.
        offset: pixels by which the maps begin above and left of the image.

    ``forward(images)``, images (B, 3, H, W) as :meth:`normalize` returns them, gives ``(features, detail)``.
    """

    stride: int
    detail_stride: int
    channels: int
    detail_channels: int
    multiple: int
    offset = 0

    def normalize(self, images: Tensor) -> Tensor:
        """RGB in [0, 1] → what ``forward`` takes; (B, 3, H, W) both ways."""
        return images


class SmallFCN(Backbone):
    """A small fully convolutional network: down to stride 16 and back up with skips.

    Args:
        channels: widths at strides 2, 4, 8 and 16, multiples of 8.
        out_channels: channels of the returned features.
        stride: stride of the returned features, 2 or 4.
        detail: also return the map at stride 2.

    Returns from ``forward(images)``, images (B, 3, H, W) with H and W multiples of 16:
        ``(features, detail)``: (B, out_channels + 2, H/stride, W/stride), the last two channels being the
        normalised x and y coordinate, and (B, channels[0], H/2, W/2), or the finest map there is without ``detail``.
    """

    multiple = 16

    def __init__(
        self, channels: tuple[int, int, int, int], out_channels: int, stride: int, detail: bool = True
    ) -> None:
        super().__init__()
        self.stride = stride
        self.finest = 0 if detail or stride == 2 else 1
        self.detail_stride = 2 << self.finest
        self.channels, self.detail_channels = out_channels + 2, channels[self.finest]
        self.stem = nn.Sequential(_conv_block(3, channels[0], stride=2), _conv_block(channels[0], channels[0]))
        self.down = nn.ModuleList(
            nn.Sequential(_conv_block(narrow, wide, stride=2), _conv_block(wide, wide))
            for narrow, wide in zip(channels[:3], channels[1:], strict=True)
        )
        self.lateral = nn.ModuleList(Pointwise(channels[k + 1], channels[k]) for k in range(self.finest, 3))
        self.fuse = nn.ModuleList(_conv_block(channels[k], channels[k]) for k in range(self.finest, 3))
        self.project = Pointwise(channels[0 if stride == 2 else 1], out_channels)

    def normalize(self, images: Tensor) -> Tensor:
        """Zero mean and unit deviation per image, so that dim and bright stains look alike."""
        mean = images.mean(dim=(1, 2, 3), keepdim=True)
        deviation = (images - mean).square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
        return (images - mean) / deviation.clamp_min(0.02)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        maps = [self.stem(images)]  # strides 2, 4, 8, 16
        for down in self.down:
            maps.append(down(maps[-1]))
        for k in range(2, self.finest - 1, -1):
            lateral, fuse = self.lateral[k - self.finest], self.fuse[k - self.finest]
            above = F.interpolate(lateral(maps[k + 1]), size=maps[k].shape[-2:], mode="nearest")
            maps[k] = fuse(maps[k] + above)
        features = self.project(maps[0] if self.stride == 2 else maps[1])
        return torch.cat([features, coordinates(features)], dim=1), maps[self.finest]


class PlantsFCN(Backbone):
    """The feature network of the released plants code: a fixed bilinear shrinking by 5, then four 3×3 convolutions.

    Args:
        channels: of every convolution, each followed by a ReLU; 30 in the released code.

    Returns from ``forward(images)``, images (B, 3, H, W) with H and W multiples of 5:
        the features (B, channels, H/5, W/5), twice: there is no finer map. 530×500 pixels become 106×100 cells.

    Source: bernard24/RIS, ``plants_learning``.
    """

    stride = detail_stride = multiple = 5
    shrink: Tensor

    def __init__(self, channels: int = 30) -> None:
        super().__init__()
        self.channels = self.detail_channels = channels
        kernel = bilinear_kernel(5)
        self.register_buffer("shrink", (kernel / kernel.sum()).expand(3, 1, 9, 9).contiguous(), persistent=False)
        layers: list[nn.Module] = []
        for width in (3, channels, channels, channels):
            layers += [nn.Conv2d(width, channels, 3, padding=1), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.layers(F.conv2d(images, self.shrink, stride=5, padding=2, groups=3))
        return features, features


def bilinear_kernel(factor: int) -> Tensor:
    """The kernel (k, k) of bilinear resampling by a whole factor, k = 2·factor − factor mod 2; its peak is near 1."""
    size = 2 * factor - factor % 2
    distance = (torch.arange(size) - (size - 1) / 2).abs()
    weights = 1 - distance / factor
    return weights.outer(weights)


def coordinates(like: Tensor) -> Tensor:
    """The x and y coordinate of every cell, −1 … 1 over the map: (B, 2, H, W), channels_last, for ``like``
    (B, ·, H, W)."""
    batch, _, height, width = like.shape  # not torch.linspace, whose number of points torch.export makes a constant
    wide = torch.promote_types(like.dtype, torch.float32)  # bf16 has no integers between 256 and 258
    y = (torch.arange(height, device=like.device, dtype=wide) * 2 / (height - 1) - 1).view(1, height, 1)
    x = (torch.arange(width, device=like.device, dtype=wide) * 2 / (width - 1) - 1).view(1, 1, width)
    both = [one.expand(batch, height, width) for one in (x, y)]
    return torch.stack(both, dim=3).to(like.dtype).permute(0, 3, 1, 2)
