"""Gaussian filtering of values at scattered points: the sum itself, and its approximation on the permutohedral lattice.

N = points, D = dimensions of the features, C = channels of the values, M = vertices of the lattice.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def gaussian_sum(features: Tensor, values: Tensor) -> Tensor:
    """``Σ_j exp(−½ |f_i − f_j|²) v_j``, what the lattice approximates, in O(N²) time and memory.

    Args:
        features: (N, D) in standard deviations, floating.
        values: (N, C) in the same dtype.
    """
    return (
        torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist").square().mul(-0.5).exp() @ values
    )


def permutohedral_lattice(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The twin of ``torch.ops.fastris.permutohedral_lattice``: every point's simplex, and the vertices' neighbours.

    Args:
        features: (N, D) in standard deviations, floating.

    Returns:
        ``(vertices, weights, neighbours)``: int32 (N, D+1), the vertices around a point by their remainder modulo
        D + 1, numbered in the order in which the points reach them; (N, D+1), its barycentric coordinates; int32
        (D+1, M, 2), the vertices before and after each vertex in each direction, −1 where that is around no point.

    Source: Adams, Baek & Davis, *Fast High-Dimensional Filtering Using the Permutohedral Lattice*, 2010.
    """
    points, dims = features.shape
    corners = dims + 1
    axis = torch.arange(1, corners, device=features.device, dtype=features.dtype)
    steps = features * (corners * math.sqrt(2 / 3) / (axis * (axis + 1)).sqrt())
    tails = steps.flip(1).cumsum(1).flip(1)  # [N, D], Σ of a step and those after it
    x = torch.cat([tails[:, :1], tails[:, 1:] - axis[:-1] * steps[:, :-1], -dims * steps[:, -1:]], dim=1)

    turns = (x / corners).round()
    rest = x - turns * corners
    nearest, excess = turns.long() * corners, turns.sum(1, keepdim=True).long()
    rank = rest.argsort(dim=1, descending=True, stable=True).argsort(dim=1) + excess
    turn = corners * ((rank < 0).long() - (rank > dims).long())
    rank, nearest = rank + turn, nearest + turn

    delta = (x - nearest) / corners  # [N, D+1]
    barycentric = features.new_zeros(points, corners + 1)
    barycentric.scatter_add_(1, dims - rank, delta)
    barycentric.scatter_add_(1, corners - rank, -delta)
    weights = torch.cat([1 + barycentric[:, :1] + barycentric[:, -1:], barycentric[:, 1:-1]], dim=1)

    remainder = torch.arange(corners, device=features.device).view(1, corners, 1)
    keys = nearest.unsqueeze(1) + remainder - corners * (rank.unsqueeze(1) > dims - remainder).long()  # [N, D+1, D+1]
    known, inverse = torch.unique(keys.flatten(0, 1), dim=0, return_inverse=True)  # [M, D+1], [N (D+1)]
    number = _in_order_of_arrival(inverse, len(known))
    vertices = number[inverse].view(points, corners).int()

    neighbours = torch.full((corners, len(known), 2), -1, dtype=torch.int32, device=features.device)
    for direction in range(corners):
        step = torch.ones(corners, dtype=torch.long, device=features.device)
        step[direction] = -dims
        both, index = torch.unique(torch.cat([known, known + step]), dim=0, return_inverse=True)
        here, there = index.chunk(2)
        owner = torch.full((len(both),), -1, dtype=torch.int32, device=features.device)
        owner[here] = number.int()
        found = owner[there]
        neighbours[direction, number, 1] = found
        neighbours[direction, found[found >= 0].long(), 0] = number[found >= 0].int()
    return vertices, weights, neighbours


def permutohedral_filter(
    values: Tensor, vertices: Tensor, weights: Tensor, neighbours: Tensor, reverse: bool = False
) -> Tensor:
    """The twin of ``torch.ops.fastris.permutohedral_filter``: splat, blur along each direction, slice.

    Args:
        values: (N, C) floating.
        vertices, weights, neighbours: of :func:`permutohedral_lattice`; a point's weights may have been scaled.
        reverse: blur along the last direction first, which is the adjoint.

    Returns:
        (N, C), near :func:`gaussian_sum` where points lie dense.
    """
    corners, count, _ = neighbours.shape
    channels = values.shape[1]
    around = vertices.long()
    splat = (weights.unsqueeze(2) * values.unsqueeze(1)).flatten(0, 1)  # [N (D+1), C]
    blurred = values.new_zeros(count + 1, channels).index_add(0, around.flatten(), splat)  # the last, for -1, stays 0
    directions = neighbours.long()
    for direction in reversed(directions) if reverse else directions:
        inner = blurred[:-1] + 0.5 * (blurred[direction[:, 0]] + blurred[direction[:, 1]])
        blurred = torch.cat([inner, blurred[-1:]])
    return gain(corners - 1) * torch.einsum("nkc,nk->nc", blurred[around], weights)


def gain(dims: int) -> float:
    """What turns the lattice's blur into sums with a Gaussian of height 1.

    A blur multiplies the sum of all vertices by 2, and there are √(D+1) (2/3)^(D/2) vertices in a unit of volume, where
    the Gaussian has (2π)^(D/2).
    """
    return (4 * math.pi / 3) ** (dims / 2) * math.sqrt(dims + 1) / 2 ** (dims + 1)


def _in_order_of_arrival(inverse: Tensor, count: int) -> Tensor:
    """(M,) new numbers of M classes, by their first place in (N,) ``inverse``."""
    places = torch.arange(len(inverse), device=inverse.device)
    first = places.new_full((count,), len(inverse)).scatter_reduce(0, inverse, places, "amin")
    return first.argsort().argsort()
