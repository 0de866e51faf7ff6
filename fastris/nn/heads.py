"""What is read off the recurrent state at each step: a place, a mask, a confidence.

B = batch, C = hidden channels, h × w = recurrent map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastris.nn.dense import DenseHead, DenseMaps
from fastris.nn.pointwise import Pointwise
from fastris.ops.dynamic_mask import dynamic_mask
from fastris.ops.look import look
from fastris.ops.place_logits import place_logits
from fastris.reference.dynamic_mask import WIDTH, cell_centres, filter_size
from fastris.reference.look import Look, spatial_log_softmax
from fastris.reference.place_logits import cells


class SpatialInhibition(nn.Module):
    """The paper's mask head: 1×1 convolution, log-softmax over the whole map, plus one learned scalar.

    All places compete for the one object of this step. ``forward((B, C, h, w))`` gives mask logits (B, h, w)
    and the log-probabilities (B, h, w) of the softmax; the mask is the sigmoid of the logits.

    Source: Romera-Paredes & Torr, ECCV 2016, section 3.2; the scalar starts at 1 in the released code.
    """

    def __init__(self, channels: int, init: float = 1.0) -> None:
        super().__init__()
        self.project = Pointwise(channels, 1)
        self.scalar = nn.Parameter(torch.tensor(float(init)))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        log_place = spatial_log_softmax(self.project(hidden).squeeze(1))
        return log_place + self.scalar, log_place


class Drawn(NamedTuple):
    """An object that a :class:`DynamicMaskHead` drew.

    Attributes:
        mask_logits: (B, h', w').
        log_place: (B, h, w) log-probabilities of the spatial softmax.
        place: (B, h, w) where the head looked: 1 in one cell, or with ``hard_place`` false those probabilities.
        attended: (B, ``attended_channels``) what is there: the hidden state and the features at the place, and the
            logit of the most likely place before the softmax.
    """

    mask_logits: Tensor
    log_place: Tensor
    place: Tensor
    attended: Tensor


class DynamicMaskHead(nn.Module):
    """Choose a place by spatial softmax, then draw the object that is there.

    The place is the most likely cell, so that one object is drawn where several are as likely; which cell that is, only
    the place term of :class:`~fastris.RISLoss` teaches. With ``hard_place`` false it is the mean of all cells by their
    probability. What is there becomes the weights of a filter of two 1×1 layers over detail features and coordinates
    relative to the place. With ``dense``, both maps also tell of every cell where the middle of its object is
    (:mod:`fastris.nn.dense`), and the filter sees how far that is from the middle that the place tells: next to
    nothing for the cells of the same object.

    ``forward(hidden, features, detail, found, base)`` takes (B, C, h, w), (B, F, h, w) and (B, ·, h', w') as
    ``prepare`` returns it. ``found``, where the head was made for it, is (B, ``found_channels``, h, w) or None for
    zeros, and gets no gradient; ``base`` is what ``place_base(features)`` returns, or None to compute it. It gives a
    :class:`Drawn`.

    Source of the filter: Tian, Shen & Chen, *Conditional Convolutions for Instance Segmentation*, ECCV 2020.
    """

    width = WIDTH
    radius = 16.0  # cells of the detail map per unit of the relative coordinates

    def __init__(
        self,
        channels: int,
        feature_channels: int,
        detail_channels: int,
        found_channels: int = 0,
        dense: bool = False,
        hard_place: bool = False,
    ) -> None:
        super().__init__()
        inner = 32
        self.hard_place = hard_place
        self.found_channels = found_channels
        self.attended_channels = channels + feature_channels + 1
        self.inputs = self.width + (6 if dense else 3)
        self.place = nn.Sequential(
            Pointwise(channels + feature_channels + found_channels, inner),
            nn.ReLU(inplace=True),
            Pointwise(inner, 1),
        )
        self.describe = nn.Sequential(
            nn.Linear(channels + feature_channels, 2 * inner),
            nn.ReLU(inplace=True),
            nn.Linear(2 * inner, filter_size(dense)),
        )
        self.detail = Pointwise(detail_channels, self.width)
        self.dense_features = DenseHead(feature_channels) if dense else None
        self.dense_detail = DenseHead(self.width) if dense else None

    def prepare(self, detail: Tensor) -> Tensor:
        """The part that is the same at every step: (B, D, h', w') → (B, width, h', w'), and with ``dense`` two channels
        more, x and y to the middle of a cell's object."""
        detail = self.detail(detail)
        if self.dense_detail is None:
            return detail.contiguous()
        return torch.cat([detail, self.dense_detail(detail).offset], dim=1).contiguous()

    def dense_maps(self, features: Tensor, detail: Tensor) -> tuple[DenseMaps, DenseMaps] | None:
        """What the features and the prepared detail show of every cell."""
        if self.dense_features is None or self.dense_detail is None:
            return None
        return self.dense_features(features), self.dense_detail(detail[:, : self.width])

    def place_base(self, features: Tensor) -> Tensor:
        """The features' part of the place, the same at every step: (B, F, h, w) → (B, ·, h, w)."""
        first, channels = self._place_layers()[0], features.shape[1]
        start = first.in_channels - self.found_channels - channels
        weight = first.weight[:, start : start + channels].flatten(1)
        assert first.bias is not None  # added last: under autocast the sum is then in fp32
        return (F.linear(features.permute(0, 2, 3, 1), weight) + first.bias).permute(0, 3, 1, 2)

    def forward(
        self,
        hidden: Tensor,
        features: Tensor,
        detail: Tensor,
        found: Tensor | None = None,
        base: Tensor | None = None,
    ) -> Drawn:
        base = self.place_base(features) if base is None else base
        logits = self._place_logits(hidden, base, found if self.found_channels else None)
        log_place, place, seen, attended, centre = (look if self.hard_place else _look_at_all)(logits, hidden, features)
        scale = detail.shape[2] // hidden.shape[2]  # cells of the detail in one
        middle = None
        if self.dense_features is not None:
            middle = self.dense_features.offset_of(seen[:, hidden.shape[1] :]).to(log_place.dtype)  # [B, 2]
        mask_logits = dynamic_mask(detail, self.describe(seen), centre * scale, middle, self.radius)
        return Drawn(mask_logits, log_place, place, attended)

    def _place_layers(self) -> tuple[Pointwise, Pointwise]:
        first, last = self.place[0], self.place[2]
        assert isinstance(first, Pointwise) and isinstance(last, Pointwise)
        return first, last

    def _place_logits(self, hidden: Tensor, base: Tensor, found: Tensor | None) -> Tensor:
        """(B, h, w): ``place`` of all that it sees, without putting it together."""
        first, last = self._place_layers()
        assert last.bias is not None
        return place_logits(hidden, base, found, first.weight.flatten(1), last.weight.flatten(), last.bias)


def _look_at_all(logits: Tensor, hidden: Tensor, features: Tensor) -> Look:
    """Like :func:`~fastris.ops.look.look`, but with the mean of all cells by their probability."""
    log_place = spatial_log_softmax(logits)
    place = log_place.exp()
    chances = place.flatten(1).unsqueeze(1)  # [B, 1, hw]
    both = [torch.bmm(chances.to(one.dtype), cells(one)) for one in (hidden, features)]
    seen = torch.cat(both, dim=2).squeeze(1)
    grid = cell_centres(logits.shape[1], logits.shape[2], log_place)  # [2, hw]
    centre = (chances * grid).sum(2)  # a matrix product would be rounded under autocast
    peak = logits.flatten(1).max(1, keepdim=True).values
    return Look(log_place, place, seen, torch.cat([seen, peak], dim=1), centre)


class Evidence(NamedTuple):
    """What a :class:`ConfidenceHead` judges by, (N, ·) each: the (pooled) state and, if it reads it, what was seen."""

    pooled: Tensor
    attended: Tensor | None

    @staticmethod
    def joined(several: Sequence[Evidence]) -> Evidence:
        """The rows of all, in their order."""
        pooled, attended = zip(*several, strict=True)
        return Evidence(torch.cat(pooled), None if attended[0] is None else torch.cat(attended))


class ConfidenceHead(nn.Module):
    """The chance that step t found an object: one linear layer over the (pooled) recurrent state.

    Args:
        channels: C.
        pool: side of the grid that the state is max-pooled to (2 in the released person network), or 0 for no
            pooling (the released plants network), which needs ``map_size`` = (h, w).
        bias: start value of the bias; the released code uses 10, so that it goes on at first.
        attended_channels: of what the step looked at, which two further layers read; 0 to do without, as the paper.

    ``forward((B, C, h, w), (B, attended_channels) or None)`` gives logits (B,); the confidence is their sigmoid. It is
    ``judge`` of the ``evidence``, which several steps may join.
    """

    def __init__(
        self,
        channels: int,
        pool: int,
        map_size: tuple[int, int] | None = None,
        bias: float = 1.0,
        attended_channels: int = 0,
    ) -> None:
        super().__init__()
        self.pool = pool
        cells = pool * pool if pool else map_size[0] * map_size[1] if map_size else 0
        self.linear = nn.Linear(channels * cells, 1)
        nn.init.constant_(self.linear.bias, bias)
        self.attend: nn.Sequential | None = None
        if attended_channels:
            self.attend = nn.Sequential(nn.Linear(attended_channels, 32), nn.ReLU(inplace=True), nn.Linear(32, 1))

    def forward(self, hidden: Tensor, attended: Tensor | None = None) -> Tensor:
        return self.judge(self.evidence(hidden, attended))

    def evidence(self, hidden: Tensor, attended: Tensor | None = None) -> Evidence:
        pooled = grid_max(hidden, self.pool) if self.pool else hidden
        return Evidence(pooled.flatten(1), None if self.attend is None else attended)

    def judge(self, evidence: Evidence) -> Tensor:
        """(N,) logits, of one step or of several together."""
        logits = self.linear(evidence.pooled)
        if self.attend is not None:
            logits = logits + self.attend(evidence.attended)
        return logits.squeeze(1)


def grid_max(maps: Tensor, side: int) -> Tensor:
    """``adaptive_max_pool2d`` to side × side; for torch.export by operators that ONNX has for maps of any size."""
    if not torch.compiler.is_exporting():
        return F.adaptive_max_pool2d(maps, side)
    for dim in (2, 3):
        size = maps.shape[dim]
        index = torch.arange(size, device=maps.device).view(-1, *[1] * (3 - dim))
        cells = [(index >= k * size // side) & (index < ((k + 1) * size + side - 1) // side) for k in range(side)]
        maps = torch.stack([maps.where(cell, -torch.inf).amax(dim) for cell in cells], dim)
    return maps
