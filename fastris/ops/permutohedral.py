"""Gaussian filters of scattered values: ``torch.ops.fastris.permutohedral_lattice`` and ``permutohedral_filter``.

N = points, D = dimensions of the features, C = channels of the values, M = vertices of the lattice. The lattice depends
on the features alone: build it once and filter as often as you like. The filter is linear in its values, and its
adjoint is the same filter with the blurs in reverse order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastris import backend, reference
from fastris.ops.arguments import describe, wrong

MOST_DIMENSIONS = 8
LARGEST = 2.0**15
"""Of a feature in standard deviations; beyond, fp32 no longer resolves a place within a simplex."""

# Schema

_library = torch.library.Library("fastris", "FRAGMENT")
_library.define("permutohedral_lattice(Tensor features) -> (Tensor vertices, Tensor weights, Tensor neighbours)")
_library.define(
    "permutohedral_filter(Tensor values, Tensor vertices, Tensor weights, Tensor neighbours, bool reverse) -> Tensor"
)

# Kernels: csrc/ registers those of the CPU, in fp32; elsewhere the reference runs

_library.impl("permutohedral_lattice", reference.permutohedral_lattice, "CompositeExplicitAutograd")
_library.impl("permutohedral_filter", reference.permutohedral_filter, "CompositeExplicitAutograd")

# Fake kernels


def _fake_lattice(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    points, corners = features.shape[0], features.shape[1] + 1
    count = torch.library.get_ctx().new_dynamic_size()  # the vertices depend on the values of the features
    vertices = features.new_empty((points, corners), dtype=torch.int32)
    return vertices, features.new_empty(points, corners), features.new_empty((corners, count, 2), dtype=torch.int32)


def _fake_filter(values: Tensor, vertices: Tensor, weights: Tensor, neighbours: Tensor, reverse: bool) -> Tensor:
    return values.new_empty(values.shape)


torch.library.register_fake("fastris::permutohedral_lattice", _fake_lattice, lib=_library)
torch.library.register_fake("fastris::permutohedral_filter", _fake_filter, lib=_library)

# Autograd


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, vertices, weights, neighbours, ctx.reverse = inputs
    ctx.save_for_backward(vertices, weights, neighbours)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.fastris.permutohedral_filter(grad, *ctx.saved_tensors, not ctx.reverse), None, None, None, None


torch.library.register_autograd("fastris::permutohedral_filter", _gradients, setup_context=_setup_context, lib=_library)

# The doors


class PermutohedralLattice(NamedTuple):
    """Where N points lie on the lattice.

    Attributes:
        vertices: int32 (N, D+1), the vertices of the simplex around each point.
        weights: (N, D+1), its barycentric coordinates. A factor of your own for each point multiplies its value as it
            goes in and the result as it comes out: with ``(K 1)^−½`` the filter is normalised on both sides.
        neighbours: int32 (D+1, M, 2), the vertices before and after each vertex in each direction, −1 for none.
    """

    vertices: Tensor
    weights: Tensor
    neighbours: Tensor


def permutohedral_lattice(features: Tensor) -> PermutohedralLattice:
    """Lay points on the permutohedral lattice, for any number of filters. Deterministic.

    No gradient flows to the features. How many vertices there are depends on their values, so that
    ``torch.compile(fullgraph=True)`` needs ``torch._dynamo.config.capture_dynamic_output_shape_ops``.

    Args:
        features: (N, D), D from 1 to 8, floating, in standard deviations. fp32 runs natively on the CPU.

    Raises:
        TypeError, ValueError: no such tensor, or features that are not finite or 2¹⁵ standard deviations from 0.

    Source: Adams, Baek & Davis, *Fast High-Dimensional Filtering Using the Permutohedral Lattice*, 2010.
    """
    expected = f"floating (N,D) with D from 1 to {MOST_DIMENSIONS}"
    if not isinstance(features, Tensor) or not features.is_floating_point() or features.dim() != 2:
        raise wrong("permutohedral_lattice", "features", expected, features)
    if not 1 <= features.shape[1] <= MOST_DIMENSIONS:
        raise wrong("permutohedral_lattice", "features", expected, features)
    features = features.detach()
    if not torch.compiler.is_compiling() and features.numel() and not bool(features.abs().amax() < LARGEST):
        raise ValueError(f"permutohedral_lattice: features must be finite and below {LARGEST:g} standard deviations")
    if _native(features):
        return PermutohedralLattice(*torch.ops.fastris.permutohedral_lattice(features))
    return PermutohedralLattice(*reference.permutohedral_lattice(features))


def permutohedral_filter(values: Tensor, lattice: PermutohedralLattice) -> Tensor:
    """``Σ_j exp(−½ |f_i − f_j|²) v_j`` approximately, in time linear in N. Deterministic, differentiable in the values.

    Where points lie dense the error is below 1 %. Where they are few for D dimensions, as the pixels of an image are in
    place and colour, sums come out smaller, by a quarter to a third there; normalising the filter evens that out.

    Args:
        values: (N, C) in the dtype of the lattice's weights.
        lattice: of the features f, from :func:`permutohedral_lattice`.

    Raises:
        TypeError, ValueError: values that are no tensor or do not fit the lattice.

    Example:
        >>> lattice = permutohedral_lattice(torch.tensor([[0.0], [0.0], [9.0]]))
        >>> values = permutohedral_filter(torch.tensor([[1.0], [2.0], [4.0]]), lattice)  # [N, 1]
    """
    weights = lattice.weights
    if not isinstance(values, Tensor) or values.dim() != 2 or values.dtype != weights.dtype:
        raise wrong("permutohedral_filter", "values", f"{str(weights.dtype).removeprefix('torch.')} (N,C)", values)
    if values.shape[0] != weights.shape[0] or values.device != weights.device:
        place = (
            f"on {weights.device}" if values.device != weights.device else f"of the lattice's {weights.shape[0]} points"
        )
        raise ValueError(f"permutohedral_filter: values must be {place}, got {describe(values)} on {values.device}")
    if _native(values):
        return torch.ops.fastris.permutohedral_filter(values, *lattice, False)
    return reference.permutohedral_filter(values, *lattice)


def _native(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and backend.runs_native("permutohedral", tensor.device.type)
