"""The permutohedral lattice: native against reference, the filter against sums of Gaussians, and its derivatives."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor

import fastris
from fastris import backend, reference
from fastris.ops.permutohedral import PermutohedralLattice, permutohedral_filter, permutohedral_lattice

native = pytest.mark.skipif(backend.native_error() is not None, reason="fastris._C is not built")
DIMENSIONS = (1, 2, 3, 5, 8)


def points(count: int, dims: int, spread: float = 2.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(count, dims) * spread).to(dtype)


def wide(lattice: PermutohedralLattice) -> PermutohedralLattice:
    return lattice._replace(weights=lattice.weights.double())


@native
@pytest.mark.parametrize("dims", DIMENSIONS)
@pytest.mark.parametrize("spread", [0.5, 30.0])
def test_the_native_lattice_is_that_of_the_reference(dims: int, spread: float) -> None:
    features = points(400, dims, spread)
    found, expected = permutohedral_lattice(features), reference.permutohedral_lattice(features)
    assert torch.equal(found.vertices, expected[0])
    assert torch.equal(found.neighbours, expected[2])
    exact = reference.permutohedral_lattice(features.double())[1]
    allowed = 2 * (expected[1] - exact).abs().max() + torch.finfo(torch.float32).eps
    assert (found.weights - exact).abs().max() <= allowed


@pytest.mark.parametrize("dims", DIMENSIONS)
def test_points_lie_between_their_vertices(dims: int) -> None:
    features = points(300, dims, dtype=torch.float64)
    vertices, weights, neighbours = permutohedral_lattice(features)
    torch.testing.assert_close(weights.sum(1), torch.ones(300, dtype=torch.float64))
    assert weights.min() > -1e-12
    assert set(vertices.flatten().tolist()) == set(range(neighbours.shape[1]))
    assert (vertices.sort(1).values.diff(dim=1) > 0).all()
    for before, after in neighbours.long().transpose(1, 2):  # the one after the one before is oneself
        has = before >= 0
        assert torch.equal(after[before[has]], torch.arange(len(before))[has])


@pytest.mark.parametrize(("dims", "side"), [(1, 400), (2, 60), (3, 22)])
def test_where_points_lie_dense_the_filter_is_a_sum_of_gaussians(dims: int, side: int) -> None:
    step = {1: 0.05, 2: 0.2, 3: 0.5}[dims]
    axis = torch.arange(side, dtype=torch.float64) * step
    features = torch.stack(torch.meshgrid(*[axis] * dims, indexing="ij"), dim=-1).flatten(0, -2)
    inner = ((features > 3) & (features < axis[-1] - 3)).all(1)
    assert inner.sum() > 20
    found = permutohedral_filter(torch.ones(len(features), 1, dtype=torch.float64), permutohedral_lattice(features))
    exact = torch.cdist(features[inner], features).square().mul(-0.5).exp().sum(1, keepdim=True)
    assert (found[inner] / exact - 1).abs().max() < 0.01


@native
@pytest.mark.parametrize("channels", [1, 10, 16, 37])
@pytest.mark.parametrize("dims", [1, 2, 5])
@pytest.mark.parametrize("reverse", [False, True])
def test_error_is_at_most_twice_that_of_eager(
    channels: int, dims: int, reverse: bool, no_worse_than_eager: Callable[..., None]
) -> None:
    lattice = permutohedral_lattice(points(3000, dims))
    values = torch.randn(channels, 3000).T  # not contiguous
    found = torch.ops.fastris.permutohedral_filter(values, *lattice, reverse)
    eager = reference.permutohedral_filter(values, *lattice, reverse)
    exact = reference.permutohedral_filter(values.double(), *wide(lattice), reverse)
    no_worse_than_eager([found], [eager], [exact])


@native
def test_native_gradients_are_those_of_the_reference(no_worse_than_eager: Callable[..., None]) -> None:
    lattice = permutohedral_lattice(points(2000, 5))
    values, grad = torch.randn(2000, 3, requires_grad=True), torch.randn(2000, 3)
    (found,) = torch.autograd.grad(permutohedral_filter(values, lattice), values, grad)
    eager = torch.autograd.grad(reference.permutohedral_filter(values, *lattice), values, grad)
    exact_values = values.detach().double().requires_grad_()
    exact = torch.autograd.grad(
        reference.permutohedral_filter(exact_values, *wide(lattice)), exact_values, grad.double()
    )
    no_worse_than_eager([found], eager, exact)


@native
@pytest.mark.parametrize("reverse", [False, True])
def test_the_derivatives_of_the_operator_of_any_order(reverse: bool) -> None:
    lattice = permutohedral_lattice(points(30, 2))
    matrix = torch.ops.fastris.permutohedral_filter(torch.eye(30), *lattice, reverse)
    assert not torch.equal(matrix, matrix.T)  # where vertices are missing the blurs do not commute
    values = torch.randn(30, 2, requires_grad=True)
    filtered = torch.ops.fastris.permutohedral_filter(values, *lattice, reverse)
    (first,) = torch.autograd.grad(filtered.square().sum(), values, create_graph=True)
    torch.testing.assert_close(first, 2 * matrix.T @ matrix @ values)
    (second,) = torch.autograd.grad(first.sum(), values)
    torch.testing.assert_close(second, 2 * matrix.T @ matrix @ torch.ones(30, 2))


def test_a_factor_of_a_point_multiplies_what_goes_in_and_what_comes_out() -> None:
    lattice = permutohedral_lattice(points(50, 3))
    values, factor = torch.randn(50, 4), torch.rand(50, 1)
    found = permutohedral_filter(values, lattice._replace(weights=lattice.weights * factor))
    torch.testing.assert_close(found, factor * permutohedral_filter(factor * values, lattice))


@native
def test_the_bits_depend_neither_on_the_threads_nor_on_what_memory_held(
    poisoned_memory: Callable[[], AbstractContextManager[None]], by_threads: Callable[..., Any]
) -> None:
    features, values = points(9000, 3), torch.randn(9000, 5)

    def run() -> tuple[Tensor, ...]:
        with poisoned_memory():
            lattice = permutohedral_lattice(features)
            return *lattice, permutohedral_filter(values, lattice)

    results = by_threads(run)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["auto", "reference"])
@pytest.mark.parametrize(("count", "channels"), [(0, 3), (4, 0), (1, 1)])
def test_few_points_and_channels(name: str, count: int, channels: int) -> None:
    with fastris.use_backend(name):
        lattice = permutohedral_lattice(points(count, 2))
        assert lattice.neighbours.shape == (3, 3 if count == 1 else lattice.neighbours.shape[1], 2)
        result = permutohedral_filter(torch.ones(count, channels), lattice)
    assert result.shape == (count, channels)
    assert (result > 0).all()


@native
def test_many_vertices_make_the_table_grow() -> None:
    features = points(2000, 5, 20.0)
    lattice = permutohedral_lattice(features)
    assert lattice.neighbours.shape[1] > 10000
    assert torch.equal(lattice.vertices, reference.permutohedral_lattice(features)[0])


def test_opcheck_and_one_graph() -> None:
    features, values = points(40, 3), torch.randn(40, 5, requires_grad=True)
    torch.library.opcheck(torch.ops.fastris.permutohedral_lattice.default, (features,))
    lattice = permutohedral_lattice(features)
    torch.library.opcheck(torch.ops.fastris.permutohedral_filter.default, (values, *lattice, False))

    def both(features: Tensor, values: Tensor) -> Tensor:
        return permutohedral_filter(values, permutohedral_lattice(features)).relu()

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        torch.testing.assert_close(compiled(features, values), both(features, values))


@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        ([[1.0]], TypeError, r"features must be a tensor, floating \(N,D\)"),
        (torch.zeros(3), ValueError, r"floating \(N,D\) with D from 1 to 8, got float32 \(3\)"),
        (torch.zeros(3, 9), ValueError, "D from 1 to 8"),
        (torch.zeros(3, 2, dtype=torch.int64), ValueError, "floating"),
        (torch.tensor([[float("nan")]]), ValueError, "must be finite"),
        (torch.tensor([[1e6]]), ValueError, "below 32768 standard deviations"),
    ],
)
def test_features_are_checked(features: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"permutohedral_lattice: .*{message}"):
        permutohedral_lattice(features)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ([1.0], TypeError, r"must be a tensor, float32 \(N,C\)"),
        (torch.zeros(5), ValueError, r"float32 \(N,C\), got float32 \(5\)"),
        (torch.zeros(5, 2, dtype=torch.float64), ValueError, "float32"),
        (torch.zeros(4, 2), ValueError, "the lattice's 5 points"),
    ],
)
def test_values_are_checked(values: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"permutohedral_filter: .*{message}"):
        permutohedral_filter(values, permutohedral_lattice(points(5, 2)))  # type: ignore[arg-type]


@native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {"values": a["values"].double()}, "values must be float32"),
        (lambda a: {"vertices": a["vertices"].long()}, "vertices must be int32"),
        (lambda a: {"vertices": a["vertices"] + 3}, "vertices must be from 0"),
        (lambda a: {"vertices": a["vertices"] - 1}, "vertices must be from 0"),
        (lambda a: {"weights": a["weights"][:-1]}, "weights must be float32"),
        (lambda a: {"neighbours": a["neighbours"] + 3}, "neighbours must be from -1"),
        (lambda a: {"neighbours": a["neighbours"][:2]}, "vertices must be int32"),
        (lambda a: {"neighbours": a["neighbours"][0]}, "neighbours must be int32"),
    ],
)
def test_the_kernel_checks_what_it_is_given(change: Callable[..., dict[str, Tensor]], message: str) -> None:
    lattice = permutohedral_lattice(torch.zeros(5, 2))
    arguments = {"values": torch.zeros(5, 1), **lattice._asdict()}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastris.permutohedral_filter(**{**arguments, **change(arguments)}, reverse=False)


@native
@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 1e9])
def test_the_kernel_refuses_features_beyond_its_numbers(bad: float) -> None:
    with pytest.raises(RuntimeError, match="features must be finite .* point 2 is not"):
        torch.ops.fastris.permutohedral_lattice(torch.tensor([[0.0], [1.0], [bad]]))


CODE = """
import torch
from fastris import reference
from fastris.ops.permutohedral import permutohedral_filter, permutohedral_lattice
torch.manual_seed(0)
lattice, values = permutohedral_lattice(torch.randn(300, 3)), torch.randn(300, 21)
expected = reference.permutohedral_filter(values.double(), *lattice._replace(weights=lattice.weights.double()))
torch.testing.assert_close(permutohedral_filter(values, lattice), expected.float())
"""


@native
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_instruction_set(capability: str) -> None:
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    result = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
