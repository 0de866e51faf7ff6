"""FCN-8s, the feature network of the paper's person model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastris.nn.backbone import Backbone, bilinear_kernel

CONVOLUTIONS = {"conv1": (64, 64), "conv2": (128, 128), "conv3": (256,) * 3, "conv4": (512,) * 3, "conv5": (512,) * 3}
STAGES = (*CONVOLUTIONS, "fc6", "fc7", "score")

CAFFE_MEAN = (123.68, 116.779, 103.939)  # RGB, of ILSVRC's training images in 0 … 255; the released code's too


class FCN8s(Backbone):
    """VGG16 as convolutions, with skips from pool3 and pool4, widened and without the last upsampling by 8.

    ``conv1_1`` … ``conv5_3``, ``fc6`` and ``fc7`` have VGG16's shapes, and the names of the usual FCN-8s checkpoints.
    Three 1×1 convolutions, ``score_fr``, ``score_pool4`` and ``score_pool3``, give `channels` maps at strides 32, 16
    and 8; the coarser are doubled by a fixed bilinear transposed convolution and added to the finer. All cells are
    aligned: with padding ``"100"`` cell i shows pixels 8i − 3 … 8i + 4, so the maps begin 3 pixels outside the image.

    New weights are PyTorch's; :func:`~fastris.nn.load_vgg16` and :func:`~fastris.nn.load_fcn8s` read trained ones. The
    buffers ``mean`` and ``std`` (RGB, of images in [0, 1]) say what those were trained on, and are saved with them.

    Args:
        channels: of the features; 100 in the paper's network, 21 in FCN-8s itself.
        padding: ``"100"``, the original: conv1_1 pads by 100 pixels and fc6 does not pad, so that an image of any size
            will do, at the cost of 198 more rows and columns. ``"same"``: every convolution pads by half its kernel.
        dropout: after fc6 and fc7, while training.
        frozen: names of :data:`STAGES` to :meth:`freeze`.
        fc_channels: of fc6 and fc7; 4096 in VGG16.

    Returns from ``forward(images)``, images (B, 3, H, W) in the manner of :meth:`normalize`, with ``"same"`` H and W
    multiples of 32:
        the features (B, channels, h, w), twice: there is no finer map. With ``"same"`` h is H/8, with ``"100"``
        4·ceil((H + 198) / 32) − 24: 64 for 500 pixels, as in the released code.

    Raises:
        ValueError: an unknown `padding` or stage; with ``"same"``, images of other sizes.

    Source: Long, Shelhamer & Darrell, *Fully Convolutional Networks for Semantic Segmentation*, CVPR 2015;
    Romera-Paredes & Torr, ECCV 2016, and bernard24/RIS, ``people_learning``, for the widening.
    """

    stride = detail_stride = 8
    mean: Tensor
    std: Tensor
    doubling: Tensor

    def __init__(
        self,
        channels: int = 100,
        padding: str = "100",
        dropout: float = 0.5,
        frozen: Sequence[str] = (),
        fc_channels: int = 4096,
    ) -> None:
        super().__init__()
        if padding not in ("100", "same"):
            raise ValueError(f"FCN8s: padding must be '100' or 'same', got {padding!r}")
        self.channels = self.detail_channels = channels
        self.wide = padding == "100"
        self.multiple, self.offset = (1, 3) if self.wide else (32, 0)
        self.dropout = dropout
        in_channels = 3
        for stage, widths in CONVOLUTIONS.items():
            for number, width in enumerate(widths, 1):
                margin = 100 if self.wide and in_channels == 3 else 1
                self.add_module(f"{stage}_{number}", nn.Conv2d(in_channels, width, 3, padding=margin))
                in_channels = width
        self.fc6 = nn.Conv2d(in_channels, fc_channels, 7, padding=0 if self.wide else 3)
        self.fc7 = nn.Conv2d(fc_channels, fc_channels, 1)
        self.score_fr = nn.Conv2d(fc_channels, channels, 1)
        self.score_pool4 = nn.Conv2d(512, channels, 1)
        self.score_pool3 = nn.Conv2d(256, channels, 1)
        self.register_buffer("doubling", bilinear_kernel(2).view(1, 1, 4, 4), persistent=False)
        self.register_buffer("mean", torch.tensor(CAFFE_MEAN) / 255)
        self.register_buffer("std", torch.full((3,), 1 / 255))
        self.freeze(frozen)

    def freeze(self, stages: Sequence[str]) -> None:
        """Train no weights of these stages, names of :data:`STAGES`; ``"score"`` is all three score layers."""
        for stage in stages:
            if stage not in STAGES:
                raise ValueError(f"FCN8s: frozen must be names of {', '.join(STAGES)}, got {stage!r}")
            for name, parameter in self.named_parameters():
                if name.split(".")[0].split("_")[0] == stage:
                    parameter.requires_grad_(False)

    def normalize(self, images: Tensor) -> Tensor:
        """RGB in [0, 1] less the mean, over the deviation, as the weights expect it."""
        return (images - self.mean.view(3, 1, 1)) / self.std.view(3, 1, 1)

    def pools(self, images: Tensor) -> list[Tensor]:
        """pool1 … pool5, strides 2 … 32, sizes rounded up."""
        pools = [images]
        for stage, widths in CONVOLUTIONS.items():
            x = pools[-1]
            for number in range(1, len(widths) + 1):
                x = F.relu(self.get_submodule(f"{stage}_{number}")(x), inplace=True)
            pools.append(F.max_pool2d(x, 2, ceil_mode=True))
        return pools[1:]

    def fully_connected(self, pool5: Tensor) -> Tensor:
        """fc7, stride 32."""
        x = pool5
        for layer in (self.fc6, self.fc7):
            x = F.dropout(F.relu(layer(x), inplace=True), self.dropout, self.training)
        return x

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if not self.wide and (images.shape[-2] % 32 or images.shape[-1] % 32):
            raise ValueError(f"FCN8s: images must have sides of multiples of 32, got {tuple(images.shape)}")
        _, _, pool3, pool4, pool5 = self.pools(images)
        scores = self._doubled(self.score_fr(self.fully_connected(pool5)))
        scores = self._doubled(scores + self.score_pool4(self._beside(scores, pool4, 6)))
        scores = scores + self.score_pool3(self._beside(scores, pool3, 12))
        return scores, scores

    def _doubled(self, scores: Tensor) -> Tensor:
        kernel = self.doubling.expand(scores.shape[1], 1, 4, 4)
        return F.conv_transpose2d(scores, kernel, stride=2, padding=1, groups=scores.shape[1])

    def _beside(self, scores: Tensor, pool: Tensor, margin: int) -> Tensor:
        """The cells of a pool at the places of the scores: with padding 100, those from `margin` on."""
        start = margin if self.wide else 0
        return pool[..., start : start + scores.shape[-2], start : start + scores.shape[-1]]
