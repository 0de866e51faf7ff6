"""The native solver on ten thousand hard matrices: SciPy's indices, in the lanes of the CPU, of a warp and of a block.

The CPU runs the very code that a CUDA warp (32 lanes) and block (128 lanes) run, in lock step.
"""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastris
from fastris import backend, reference
from fastris.ops.assignment import INFEASIBLE, INVALID

pytestmark = pytest.mark.skipif(backend.native_error() is not None, reason="fastris._C is not built")

PER_EXAMPLE = 25
EXAMPLES = 400  # of PER_EXAMPLE matrices each: 10,000 for every test that uses `draws`
INF, NAN = np.inf, np.nan

FAMILIES = {
    "uniform": lambda random, shape: random.random(shape),
    "soft IoU": lambda random, shape: -np.maximum(random.random(shape) * 3 - 2, 0),
    "sixteenths": lambda random, shape: random.integers(0, 17, shape) / 16,
    "integers": lambda random, shape: random.integers(-3, 4, shape).astype(float),
    "constant": lambda random, shape: np.full(shape, random.normal()),
    "tiny": lambda random, shape: random.normal(size=shape) * 1e-11,
    "huge": lambda random, shape: random.normal(size=shape) * 1e30,
    "tiny and huge": lambda random, shape: random.normal(size=shape) * 10.0 ** random.integers(-11, 31, shape),
    "distances": lambda random, shape: np.abs(random.random((shape[0], 1)) - random.random((1, shape[1]))),
    "products": lambda random, shape: np.outer(np.arange(1.0, shape[0] + 1), np.arange(1.0, shape[1] + 1)),
    "forbidden": lambda random, shape: np.where(random.random(shape) < 0.3, INF, random.integers(0, 9, shape)),
    "blocks": lambda random, shape: blocks(random, shape),
    "infeasible": lambda random, shape: np.where(random.random(shape) < 0.85, INF, random.random(shape)),
    "NaN": lambda random, shape: np.where(random.random(shape) < 0.1, NAN, random.integers(0, 9, shape)),
    "all infinite": lambda random, shape: np.full(shape, random.choice([INF, -INF, NAN])),
    "overflow": lambda random, shape: np.where(
        random.random(shape) < 0.1, INF, random.choice([-1.79e308, 1.79e308, 1e308, 0.0], shape)
    ),
    "anything": lambda random, shape: random.choice([INF, -INF, NAN, 0.0, 1.0, 1.0, 2.0], shape),
}
DEFINED_BY_SCIPY = {
    *("uniform", "soft IoU", "sixteenths", "integers", "constant", "tiny", "huge", "tiny and huge"),
    *("distances", "products"),
}

draws = st.tuples(
    st.sampled_from(sorted(FAMILIES)), st.integers(0, 40), st.integers(0, 40), st.integers(0, 2**32 - 1), st.booleans()
)


def blocks(random: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    cost = random.random(shape)
    cost[: random.integers(0, shape[0] + 1), : random.integers(0, shape[1] + 1)] = INF
    return cost


def make(family: str, rows: int, cols: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    random = np.random.default_rng(seed)
    with np.errstate(over="ignore"):
        matrices = [FAMILIES[family](random, (rows, cols)) for _ in range(PER_EXAMPLE)]
    return torch.from_numpy(np.stack(matrices)).to(dtype)


def need(lanes: int) -> None:
    """Skips where the machine does not have them."""
    try:
        torch.ops.fastris.assignment_lanes(torch.zeros(1, 1, 1), None, None, False, lanes)
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ten_thousand_matrices_have_the_indices_of_the_reference(dtype: torch.dtype) -> None:
    @settings(deadline=None, max_examples=EXAMPLES)
    @given(draws)
    def check(draw) -> None:
        family, rows, cols, seed, maximize = draw
        cost = make(family, rows, cols, seed, dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            expected = reference.assignment(cost, maximize=maximize)
        found = fastris.assignment(cost, maximize=maximize)
        assert torch.equal(found.col_of_row, expected.col_of_row)
        assert torch.equal(found.status, expected.status)
        if family in DEFINED_BY_SCIPY:
            assert not found.status.any()
            for matrix, cols_of_rows in zip(cost.double().numpy(), found.col_of_row.numpy(), strict=True):
                row_ind, col_ind = scipy.optimize.linear_sum_assignment(matrix, maximize)
                assert (np.flatnonzero(cols_of_rows >= 0) == row_ind).all()
                assert (cols_of_rows[row_ind] == col_ind).all()

    check()


@pytest.mark.parametrize("lanes", [2, 4, 8, 32, 128])
def test_every_number_of_lanes_gives_the_same(lanes: int) -> None:
    operator = torch.ops.fastris.assignment_lanes
    need(lanes)

    @settings(deadline=None, max_examples=EXAMPLES)
    @given(draws, st.booleans())
    def check(draw, single: bool) -> None:
        family, rows, cols, seed, maximize = draw
        cost = make(family, rows, cols, seed, torch.float32 if single else torch.float64)
        random = np.random.default_rng(seed)
        num_rows, num_cols = (torch.from_numpy(random.integers(-1, most + 2, PER_EXAMPLE)) for most in (rows, cols))
        for found, expected in zip(
            operator(cost, num_rows, num_cols, maximize, lanes),
            torch.ops.fastris.assignment(cost, num_rows, num_cols, maximize),
            strict=True,
        ):
            assert torch.equal(found, expected)

    check()


@pytest.mark.parametrize("lanes", [4, 8, 32, 128])
@pytest.mark.parametrize("shape", [(150, 140), (140, 300), (257, 129)])
@pytest.mark.parametrize("family", ["integers", "sixteenths", "forbidden", "soft IoU"])
def test_matrices_wider_than_the_lanes(family: str, shape: tuple[int, int], lanes: int) -> None:
    need(lanes)
    cost = make(family, *shape, seed=3, dtype=torch.float32)[:3]
    num_rows, num_cols = torch.tensor([shape[0], 70, 130]), torch.tensor([shape[1], 129, 66])
    expected = reference.assignment(cost, num_rows, num_cols)
    col_of_row, status = torch.ops.fastris.assignment_lanes(cost, num_rows, num_cols, False, lanes)
    assert torch.equal(col_of_row, expected.col_of_row)
    assert torch.equal(status, expected.status)


def scaled_rows(random: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return random.random(shape) * 10.0 ** random.integers(-3, 17, (shape[0], 1))


def rows_far_away(random: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Where a row is far away, rounding raises duals of columns by much more than the other costs are rounded by."""
    return random.random(shape) + 1e14 * (random.random((shape[0], 1)) < 0.2)


def overflowing_rows(random: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    cost = random.random(shape)
    cost[-30:] = (2 * random.random((30, shape[1])) - 1) * 1.7e308
    return cost


def one_wide_row(random: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    cost = random.random(shape)
    cost[40] = 1e307
    cost[40, 3] = -1.79e308
    return cost


def distances(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    return np.abs(some[:, None] - others[None]).sum(2).astype(float)


LARGE_FAMILIES = FAMILIES | {
    "price war": lambda random, shape: 1e-3 * random.random(shape) + (random.random(shape[1]) < 0.5),
    "points": lambda random, shape: distances(random.random((shape[0], 2)), random.random((shape[1], 2))),
    "points of a grid": lambda random, shape: distances(
        random.integers(0, 30, (shape[0], 2)), random.integers(0, 30, (shape[1], 2))
    ),
    "some points out of reach": lambda random, shape: np.where(
        random.random(shape) < 0.3, INF, LARGE_FAMILIES["points of a grid"](random, shape)
    ),
    "thousands": lambda random, shape: random.integers(0, 1000, shape).astype(float),
    "uneven columns": lambda random, shape: random.random(shape) * np.exp(5 * random.normal(size=shape[1])),
    "equal rows": lambda random, shape: np.repeat(random.random((shape[0] // 4 + 1, shape[1])), 4, axis=0)[: shape[0]],
    "sums": lambda random, shape: random.random((shape[0], 1)) + random.random((1, shape[1])),
    "far from zero": lambda random, shape: random.random(shape) + random.choice([1e6, -1e9, 1e12]),
    "last bits": lambda random, shape: 2.0**52 + random.integers(0, 20, shape),
    "few finite": lambda random, shape: np.where(random.random(shape) < 0.95, INF, random.random(shape)),
    "scaled rows": scaled_rows,
    "rows far away": rows_far_away,
    "overflowing rows": overflowing_rows,
    "one wide row": one_wide_row,
    "overflowing everywhere": lambda random, shape: (2 * random.random(shape) - 1) * 1.7e308,
}


@pytest.mark.parametrize("lanes", [2, 4, 8])
@pytest.mark.parametrize("family", sorted(LARGE_FAMILIES))
def test_near_columns_are_enough(family: str, lanes: int) -> None:
    need(lanes)
    random = np.random.default_rng(7)
    for shape in ((256, 256), (300, 280), (150, 256)):
        counts = [torch.tensor([size] * 3 + [size - 20]) for size in shape]
        for dtype in (torch.float64, torch.float32):
            with np.errstate(over="ignore", invalid="ignore"):
                matrices = [LARGE_FAMILIES[family](random, shape) for _ in range(4)]
                cost = torch.from_numpy(np.stack(matrices)).to(dtype)
                expected = reference.assignment(cost, *counts)
            col_of_row, status = torch.ops.fastris.assignment_lanes(cost, *counts, False, lanes)
            assert torch.equal(col_of_row, expected.col_of_row)
            assert torch.equal(status, expected.status)


def test_lanes_that_no_machine_has_are_refused() -> None:
    with pytest.raises(RuntimeError, match="does not have 7 lanes"):
        torch.ops.fastris.assignment_lanes(torch.zeros(1, 1, 1), None, None, False, 7)


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_permuting_and_shifting_change_the_pairs_and_the_total_as_they_must(rows: int, cols: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    cost = torch.from_numpy(random.permutation(rows * cols).reshape(rows, cols).astype(float) ** 1.5)

    def total(matrix: torch.Tensor) -> float:
        row_ind, col_ind = fastris.linear_sum_assignment(matrix)
        return float(matrix[row_ind, col_ind].sum())

    row_order, col_order = (torch.from_numpy(random.permutation(size)) for size in (rows, cols))
    assert total(cost[row_order][:, col_order]) == pytest.approx(total(cost), rel=1e-12)
    assert total(cost.T) == pytest.approx(total(cost), rel=1e-12)
    assert total(cost + 7) == pytest.approx(total(cost) + 7 * min(rows, cols), rel=1e-12)


@pytest.mark.parametrize("shape", [(512, 512), (300, 50), (50, 300), (2048, 40), (129, 127)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_matrices_have_scipys_indices(shape: tuple[int, int], dtype: torch.dtype) -> None:
    random = np.random.default_rng(1)
    cost = torch.from_numpy(np.stack([FAMILIES[name](random, shape) for name in ("soft IoU", "uniform")])).to(dtype)
    for matrix, cols in zip(cost.double().numpy(), fastris.assignment(cost).col_of_row, strict=True):
        row_ind, col_ind = scipy.optimize.linear_sum_assignment(matrix)
        assert (cols.numpy()[row_ind] == col_ind).all()


@pytest.mark.parametrize(
    "cost",
    [
        torch.full((1, 300, 300), INF),
        torch.full((1, 300, 300), NAN),
        torch.full((1, 300, 300), 1e308, dtype=torch.float64) * torch.where(torch.eye(300) > 0, -1.0, 1.0),
        (torch.rand(1, 300, 300, dtype=torch.float64) * 2 - 1) * 1.7e308,
        torch.tril(torch.full((1, 300, 300), INF)) + torch.rand(1, 300, 300),
        torch.arange(1.0, 301).outer(torch.arange(1.0, 301))[None],
    ],
    ids=["inf", "nan", "overflow", "random overflow", "triangle", "products"],
)
def test_what_might_hang_returns_quickly(cost: torch.Tensor) -> None:
    start = time.process_time()
    col_of_row, status = fastris.assignment(cost)
    assert time.process_time() - start < 5
    matched = col_of_row[col_of_row >= 0]
    assert len(matched.unique()) == len(matched)
    assert int(status) & ~(INFEASIBLE | INVALID) == 0


def test_concurrent_calls_from_four_threads_agree() -> None:
    batches = [torch.rand(32, 40 + k, 30, generator=torch.Generator().manual_seed(k)) for k in range(4)]
    alone = [fastris.assignment(cost).col_of_row for cost in batches]
    failures: list[int] = []

    def run(k: int) -> None:
        for _ in range(50):
            if not torch.equal(fastris.assignment(batches[k]).col_of_row, alone[k]):
                failures.append(k)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
