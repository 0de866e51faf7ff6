"""Seeded inputs for the benchmarks: distinct matrices of several families, masks, and what set-prediction heads emit.

Solvers that see the same few matrices again are flattered by caches and branch prediction, so that every family gives
:func:`count` different matrices of a shape and a batch size only says how many of them go into one call.

B = batch, P = predictions or rows, G = targets or columns, S = side of a square mask.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import lru_cache
from math import ceil
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from fastris import reference

FEW_COSTS = 2**21
"""Most costs in all matrices of a shape together, so that one pass over them takes a solver at most about a second."""

COST_SIDE = 64
"""Side of the masks behind the ``soft_iou`` family."""


def generator(*key: object) -> Generator:
    """The same random numbers for the same key, in every process."""
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


def count(rows: int, cols: int) -> int:
    """How many distinct matrices of a shape there are: 512, or the power of two that ``FEW_COSTS`` allows."""
    return 1 << min(9, (FEW_COSTS // (rows * cols)).bit_length() - 1)


def uniform(batch: int, rows: int, cols: int, random: Generator) -> Tensor:
    """Independent costs in [0, 1): what solvers are usually compared on."""
    return torch.rand(batch, rows, cols, generator=random, dtype=torch.float64)


def soft_iou(batch: int, rows: int, cols: int, random: Generator) -> Tensor:
    """−IoU of soft masks with the objects they half find: mostly zeros, which tie."""
    chunks = []
    for start in range(0, batch, 32):
        pred, labels = masks(min(32, batch - start), rows, cols, COST_SIDE, random)
        chunks.append(-reference.soft_iou(pred.double(), labels, num_labels=cols))
    return torch.cat(chunks)


def tied(batch: int, rows: int, cols: int, random: Generator) -> Tensor:
    """Steps of 1/16 in [0, 1]: many optima, all arithmetic exact."""
    return torch.randint(17, (batch, rows, cols), generator=random).double() / 16


def geometric(batch: int, rows: int, cols: int, random: Generator) -> Tensor:
    """‖a − b‖ of random points in a square: costs that obey the triangle inequality."""
    points = torch.rand(batch, rows + cols, 2, generator=random, dtype=torch.float64)
    return torch.cdist(points[:, :rows], points[:, rows:])


def product(batch: int, rows: int, cols: int, random: Generator) -> Tensor:
    """a_i · b_j with increasing integers a and b: every shortest augmenting path is as long as it can be.

    With a_i = i and b_j = j these are Machol and Wien's hard matrices (Operations Research 24(1), 1976); steps of 1 to
    3 in place of 1 make the matrices of a batch differ.
    """
    left = torch.randint(1, 4, (batch, rows, 1), generator=random).cumsum(1)
    right = torch.randint(1, 4, (batch, 1, cols), generator=random).cumsum(2)
    return (left * right).double()


def price_war(batch: int, rows: int, cols: int, random: Generator) -> Tensor:
    """Half the columns (or rows, where there are fewer columns) cost next to nothing, the other half one more.

    Everybody bids for the cheap half in steps of about 1e-3 until it costs as much as the other half: many rounds of
    the augmenting row reduction of Jonker and Volgenant (Computing 38, 1987) as of any auction.
    """
    few, many = min(rows, cols), max(rows, cols)
    cost = 1e-3 * torch.rand(batch, few, many, generator=random, dtype=torch.float64)
    order = torch.rand(batch, 1, many, generator=random).argsort(2)
    cost += (order >= few // 2).double()
    return cost if rows <= cols else cost.transpose(1, 2)


FAMILIES: dict[str, Callable[[int, int, int, Generator], Tensor]] = {
    "uniform": uniform,
    "soft_iou": soft_iou,
    "tied": tied,
    "geometric": geometric,
    "product": product,
    "price_war": price_war,
}


@lru_cache(maxsize=4)
def matrices(family: str, rows: int, cols: int) -> Tensor:
    """All distinct matrices of a family and shape: float64 (count, P, G), contiguous."""
    costs = FAMILIES[family](count(rows, cols), rows, cols, generator(family, rows, cols))
    return costs.contiguous()


def masks(
    batch: int, num_pred: int, num_target: int, side: int, random: Generator, jitter: float = 0.35
) -> tuple[Tensor, Tensor]:
    """Soft predictions of elliptic objects that lie on a jittered grid.

    The first predictions, in random order, each look for an object of their own, any further ones for a random one.

    Args:
        jitter: how far predictions miss in place, in cells of the grid, and in the logarithm of the size.

    Returns:
        pred float32 (B, P, S, S) in [0, 1], exactly 0 away from the object, and labels int64 (B, S, S), 0 = background.
    """
    across = ceil(num_target**0.5)
    cell = side / across
    cells = torch.rand(batch, across * across, generator=random).argsort(1)[:, :num_target]
    corner = torch.stack((cells // across, cells % across), dim=2)
    centre = (corner + 0.5 + 0.3 * (torch.rand(batch, num_target, 2, generator=random) - 0.5)) * cell
    radius = (0.3 + 0.2 * torch.rand(batch, num_target, 2, generator=random)) * cell

    objects = _ellipses(centre, radius, side) > 0.5
    numbers = torch.arange(1, num_target + 1).view(1, -1, 1, 1)
    labels = (objects * numbers).amax(1)

    own = torch.arange(num_pred).expand(batch, -1) % num_target
    other = torch.randint(num_target, (batch, num_pred), generator=random)
    wanted = torch.where(torch.arange(num_pred) < num_target, own, other)
    order = torch.rand(batch, num_pred, generator=random).argsort(1)
    wanted = wanted.gather(1, order).unsqueeze(2).expand(-1, -1, 2)
    missed = jitter * torch.randn(batch, num_pred, 2, generator=random)
    grown = (jitter * torch.randn(batch, num_pred, 2, generator=random)).exp()
    pred = _ellipses(centre.gather(1, wanted) + missed * cell, radius.gather(1, wanted) * grown, side)
    pred *= 0.3 + 0.7 * torch.rand(batch, num_pred, 1, 1, generator=random)
    pred *= 0.8 + 0.2 * torch.rand(batch, num_pred, side, side, generator=random)
    return pred, labels


def _ellipses(centre: Tensor, radius: Tensor, side: int) -> Tensor:
    """Ellipses with an edge that falls from 1 to 0 linearly: (B, N, 2), (B, N, 2) → (B, N, S, S)."""
    at = torch.arange(side) + 0.5
    vertical, horizontal = ((at - centre.unsqueeze(3)) / radius.unsqueeze(3)).square().unbind(2)  # [B, N, S]
    distance = (vertical.unsqueeze(3) + horizontal.unsqueeze(2)).sqrt()
    return (1.5 - distance).clamp(0, 1)


class SetPrediction(NamedTuple):
    """What a DETR or Mask2Former head emits, and its targets."""

    outputs: dict[str, Tensor]
    targets: list[dict[str, Tensor]]


def boxes_of_detr(batch: int, num_query: int, most_targets: int, random: Generator) -> SetPrediction:
    """COCO's 91 classes and boxes (centre, size); 1 to ``most_targets`` targets, each near a query of its own."""
    logits = torch.randn(batch, num_query, 92, generator=random)
    boxes = torch.rand(batch, num_query, 4, generator=random) * 0.5 + 0.25
    targets = []
    for image in range(batch):
        number = int(torch.randint(1, most_targets + 1, (), generator=random))
        found = torch.randperm(num_query, generator=random)[:number]
        classes = torch.randint(91, (number,), generator=random)
        logits[image, found, classes] += 4
        near = boxes[image, found] + 0.03 * torch.randn(number, 4, generator=random)
        targets.append({"labels": classes, "boxes": near.clamp(0.05, 0.95)})
    return SetPrediction({"pred_logits": logits, "pred_boxes": boxes}, targets)


def masks_of_mask2former(batch: int, num_query: int, most_targets: int, side: int, random: Generator) -> SetPrediction:
    """80 classes, mask logits (B, Q, S, S) and binary targets, each with one query that fits much better than others.

    So clear a winner makes the matching independent of the random points at which matchers look.
    """
    pred, labels = masks(batch, most_targets, most_targets, side, random, jitter=0.05)
    logits = torch.full((batch, num_query, side, side), -4.0)
    logits += torch.randn(logits.shape, generator=random)
    logits[:, :most_targets] += 8 * pred
    targets = []
    for image in range(batch):
        number = int(torch.randint(1, most_targets + 1, (), generator=random))
        of_target = labels[image] == torch.arange(1, number + 1).view(-1, 1, 1)
        targets.append({"labels": torch.randint(80, (number,), generator=random), "masks": of_target.float()})
    classes = torch.randn(batch, num_query, 81, generator=random)
    return SetPrediction({"pred_logits": classes, "pred_masks": logits}, targets)
