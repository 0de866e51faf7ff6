"""assignment: SciPy's indices, and bad costs that never raise."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import fastris
from fastris import backend, reference
from fastris.ops.assignment import INFEASIBLE, INVALID

BACKENDS = [
    "reference",
    pytest.param(
        "native",
        marks=pytest.mark.skipif(backend.native_error() is not None, reason="fastris._C is not built"),
    ),
]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
INF, NAN = float("inf"), float("nan")

shapes = st.tuples(st.integers(1, 9), st.integers(1, 9))
uniform = st.floats(-1e6, 1e6)
tied = st.integers(-3, 3).map(float)
sixteenths = st.integers(0, 16).map(lambda k: k / 16)
with_blocks = st.one_of(tied, st.just(INF))
with_anything = st.one_of(tied, st.sampled_from([INF, -INF, NAN]))


def matrices(elements: st.SearchStrategy[float]) -> st.SearchStrategy[np.ndarray]:
    return shapes.flatmap(lambda shape: hnp.arrays(np.float64, shape, elements=elements))


@pytest.fixture(params=BACKENDS)
def each_backend(request: pytest.FixtureRequest):
    with fastris.use_backend(request.param):
        yield request.param


def scipy_cols(cost: np.ndarray, maximize: bool = False) -> list[int]:
    cols = [-1] * cost.shape[0]
    for row, col in zip(*scipy.optimize.linear_sum_assignment(cost, maximize), strict=True):
        cols[row] = int(col)
    return cols


def solve(cost: np.ndarray | list, **options) -> tuple[list[int], int]:
    col_of_row, status = fastris.assignment(torch.as_tensor(np.asarray(cost))[None], **options)
    return col_of_row[0].tolist(), int(status)


@pytest.mark.parametrize("elements", [uniform, tied, sixteenths], ids=["uniform", "tied", "sixteenths"])
def test_indices_are_scipys_ties_included(elements: st.SearchStrategy[float]) -> None:
    @settings(deadline=None, max_examples=300)
    @given(matrices(elements), st.booleans())
    def check(cost: np.ndarray, maximize: bool) -> None:
        assert solve(cost, maximize=maximize) == (scipy_cols(cost, maximize), 0)

    check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(8, 6), (30, 17), (33, 21)])
def test_nearest_columns_that_differ_up_to_some_row(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Where all nearest are different nothing is copied; a row that breaks that may be any, in any way."""
    random = np.random.default_rng(0)
    many, few = shape
    for last in range(few + 1):
        for bad in (0.5, NAN, INF, -INF, "tie", "taken"):
            cost = random.uniform(1, 2, shape)
            nearest = random.permutation(many)[:few]
            cost[nearest, range(few)] = random.uniform(0, 1, few)
            if last < few:
                if bad == "tie":
                    cost[random.choice(many, 2, replace=False), last] = -1.0
                elif bad == "taken":
                    cost[nearest[random.integers(few)], last] = -1.0
                else:
                    cost[random.integers(many), last] = bad
            batch = torch.tensor(cost, dtype=dtype)[None]
            for maximize in (False, True):
                given = -batch if maximize else batch
                found = fastris.assignment(given, maximize=maximize)
                expected = reference.assignment(given, maximize=maximize)
                assert torch.equal(found.col_of_row, expected.col_of_row), (last, bad, maximize)
                assert torch.equal(found.status, expected.status), (last, bad, maximize)


@settings(deadline=None, max_examples=500)
@given(matrices(with_anything), st.booleans())
def test_the_backends_agree_on_inf_and_nan(cost: np.ndarray, maximize: bool) -> None:
    batch = torch.from_numpy(cost)[None]
    found = fastris.assignment(batch, maximize=maximize)
    expected = reference.assignment(batch, maximize=maximize)
    assert torch.equal(found.col_of_row, expected.col_of_row)
    assert torch.equal(found.status, expected.status)


@settings(deadline=None, max_examples=300)
@given(matrices(with_blocks))
def test_forbidden_edges_are_never_used_and_as_many_rows_as_possible_are_matched(cost: np.ndarray) -> None:
    cols, status = solve(cost)
    pairs = [(row, col) for row, col in enumerate(cols) if col >= 0]
    assert len({col for _, col in pairs}) == len(pairs)
    assert all(np.isfinite(cost[pair]) for pair in pairs)
    graph = np.where(np.isfinite(cost), -1.0, 0.0)
    most = -graph[scipy.optimize.linear_sum_assignment(graph)].sum()
    assert len(pairs) == most
    assert bool(status & INFEASIBLE) == (most < min(cost.shape))


@pytest.mark.parametrize("shape", [(22, 20), (20, 22), (100, 20), (64, 64), (1, 50), (50, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int32])
def test_larger_batches_of_every_dtype_match_scipy(
    shape: tuple[int, int], dtype: torch.dtype, each_backend: str
) -> None:
    cost = (torch.rand(5, *shape) * 100).to(dtype)
    found = fastris.assignment(cost)
    assert found.col_of_row.dtype == torch.int64 and found.status.dtype == torch.int32
    for matrix, cols in zip(cost, found.col_of_row, strict=True):
        assert cols.tolist() == scipy_cols(matrix.double().numpy())


@pytest.mark.parametrize(
    ("cost", "cols", "status"),
    [
        ([[NAN, 1.0], [0.0, 1.0]], [1, 0], INVALID),
        ([[-INF, 1.0], [0.0, 1.0]], [1, 0], INVALID),
        ([[NAN, NAN], [NAN, NAN]], [0, 1], INVALID),
        ([[INF, INF], [0.0, 1.0]], [-1, 0], INFEASIBLE),
        ([[INF, 1.0], [INF, 0.0]], [1, -1], INFEASIBLE),
        ([[INF, 1.0], [INF, 0.0], [INF, -1.0]], [-1, -1, 1], INFEASIBLE),
        ([[INF, INF], [INF, INF]], [-1, -1], INFEASIBLE),
        ([[NAN, INF], [2.0, INF]], [0, -1], INVALID | INFEASIBLE),
        ([[1.0], [0.0], [2.0]], [-1, 0, -1], 0),
    ],
)
def test_bad_costs_have_a_defined_result(cost: list, cols: list[int], status: int, each_backend: str) -> None:
    assert solve(cost) == (cols, status)


def test_when_maximising_minus_inf_forbids_and_plus_inf_is_the_worst(each_backend: str) -> None:
    assert solve([[-INF, 1.0], [3.0, 9.0]], maximize=True) == ([1, 0], 0)
    assert solve([[INF, 1.0], [3.0, 3.0]], maximize=True) == ([0, 1], INVALID)


def test_counts_choose_the_leading_block_of_each_image(each_backend: str) -> None:
    cost = torch.rand(6, 7, 5, dtype=torch.float64)
    cost[:, 5:] = NAN
    rows, cols = torch.tensor([5, 3, 0, 4, 1, 5]), torch.tensor([5, 5, 4, 0, 1, 2])
    found = fastris.assignment(cost, rows, cols)
    assert found.status.tolist() == [0] * 6
    for index in range(6):
        block = cost[index, : rows[index], : cols[index]].numpy()
        assert found.col_of_row[index].tolist() == scipy_cols(block) + [-1] * (7 - int(rows[index]))


def test_counts_of_any_integer_type_are_clamped(each_backend: str) -> None:
    cost = torch.rand(3, 4, 4)
    everything = fastris.assignment(cost).col_of_row
    found = fastris.assignment(cost, torch.tensor([9, -1, 4], dtype=torch.int32), torch.tensor([9, 4, 4]).short())
    assert torch.equal(found.col_of_row[[0, 2]], everything[[0, 2]])
    assert found.col_of_row[1].tolist() == [-1] * 4


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)])
def test_empty_batches_and_matrices(shape: tuple[int, int, int], each_backend: str) -> None:
    col_of_row, status = fastris.assignment(torch.empty(shape))
    assert col_of_row.shape == shape[:2] and (col_of_row == -1).all()
    assert status.tolist() == [0] * shape[0]


def test_non_contiguous_costs_and_counts(each_backend: str) -> None:
    cost = torch.rand(9, 6, 8, dtype=torch.float64)
    counts = torch.tensor([[3, 0], [5, 0], [6, 0], [2, 0]])[:, 0]
    for view in (cost.mT[::3], cost[1::3, ::2], cost.permute(2, 0, 1)[:3], cost[:1, :1].expand(3, 4, 8)):
        sub = counts[: view.shape[0]]
        expected = fastris.assignment(view.contiguous(), sub.contiguous())
        assert torch.equal(fastris.assignment(view, sub).col_of_row, expected.col_of_row)
    flipped = torch.from_numpy(np.asfortranarray(np.random.rand(4, 5)))
    assert fastris.assignment(flipped[None]).col_of_row[0].tolist() == scipy_cols(flipped.numpy())


@pytest.mark.parametrize("stride", [20, 29, 40, 41])
def test_nothing_is_read_beyond_the_last_cost(stride: int, each_backend: str) -> None:
    """Which AddressSanitizer sees: rows that are apart, the last of which ends with the memory."""
    view = torch.rand(499 * stride + 20).as_strided((1, 500, 20), (0, stride, 1))
    assert torch.equal(fastris.assignment(view).col_of_row, fastris.assignment(view.contiguous()).col_of_row)


def test_huge_and_tiny_costs_neither_hang_nor_crash(each_backend: str) -> None:
    for scale in (1e308, 1.7e308, 5e-324):
        cost = (torch.rand(4, 6, 6, dtype=torch.float64) - 0.5) * 2 * scale
        cols = fastris.assignment(cost).col_of_row
        assert all(len(set(row)) == len(row) for row in [[c for c in r if c >= 0] for r in cols.tolist()])


def test_the_result_does_not_depend_on_the_number_of_threads() -> None:
    cost = torch.rand(64, 20, 20)
    expected = fastris.assignment(cost).col_of_row
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(fastris.assignment(cost).col_of_row, expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("operator", ["assignment", "assignment_reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(operator: str, device: str, dtype: torch.dtype) -> None:
    op = getattr(torch.ops.fastris, operator).default
    cost = torch.rand(3, 5, 4, dtype=dtype, device=device)
    counts = torch.tensor([5, 2, 0], device=device)
    for arguments in ((cost,), (cost, counts, None, True), (cost.mT, None, counts), (cost[:0],)):
        torch.library.opcheck(op, arguments)


def test_compiles_to_one_graph_on_each_backend(each_backend: str) -> None:
    def total(cost: torch.Tensor, rows: torch.Tensor, maximize: bool) -> tuple[torch.Tensor, torch.Tensor]:
        found = fastris.assignment(cost * 2, rows, maximize=maximize)
        picked = cost.gather(2, found.col_of_row.clamp(min=0)[..., None])[..., 0]
        return (picked * (found.col_of_row >= 0)).sum(), found.status

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    for batch, maximize in ((4, False), (6, True)):
        cost = torch.rand(batch, 5, 7, requires_grad=True)
        rows = torch.randint(0, 6, (batch,))
        expected, status = total(cost, rows, maximize)
        found, found_status = compiled(cost, rows, maximize)
        assert torch.equal(found, expected) and torch.equal(found_status, status)
        (gradient,) = torch.autograd.grad(found, cost)
        assert torch.equal(gradient, torch.autograd.grad(expected, cost)[0])


def test_a_compiled_function_follows_a_change_of_backend() -> None:
    if backend.native_error() is not None:
        pytest.skip("fastris._C is not built")
    compiled = torch.compile(lambda cost: fastris.assignment(cost).col_of_row, fullgraph=True, backend="aot_eager")
    cost = torch.rand(2, 3, 3)
    for name, expected in (("native", "fastris::assignment"), ("reference", "fastris::assignment_reference")):
        with fastris.use_backend(name):
            compiled(cost)
            with torch.profiler.profile(acc_events=True) as profile:
                compiled(cost)
        assert expected in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((np.zeros((1, 2, 2)),), TypeError, "cost must be a tensor, got ndarray"),
        ((torch.zeros(2, 2),), ValueError, r"cost must be real \(B,P,G\), got float32 \(2,2\)"),
        ((torch.zeros(1, 2, 2, dtype=torch.complex64),), ValueError, "cost must be real"),
        (
            (torch.zeros(1, 2, 2), torch.zeros(2).long()),
            ValueError,
            r"num_rows must be integer \(1,\), got int64 \(2\)",
        ),
        ((torch.zeros(1, 2, 2), None, torch.zeros(1)), ValueError, "num_cols must be integer"),
        ((torch.zeros(1, 2, 2), [2]), TypeError, "num_rows must be a tensor, got list"),
    ],
)
def test_wrong_arguments_are_named(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="assignment: " + message):
        fastris.assignment(*arguments)


@pytest.mark.skipif(backend.native_error() is not None, reason="fastris._C is not built")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 2),), "cost must be"),
        ((torch.zeros(1, 2, 2).half(),), "float32 or float64"),
        ((torch.zeros(1, 2, 2), torch.zeros(3).long()), "num_rows must be"),
        ((torch.zeros(1, 2, 2), None, torch.zeros(1)), "num_cols must be"),
    ],
)
def test_the_kernel_itself_refuses_what_would_be_unsafe(arguments: tuple, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastris.assignment(*arguments)


# A warp a matrix, a block a matrix, costs and then all scratch in global memory, and the sides the other way round.
@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["uniform", "integers", "forbidden and NaN"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "shape", [(33, 22, 20), (3, 1, 7), (2, 100, 100), (3, 129, 200), (2, 300, 50), (1, 512, 512), (1, 2, 9000)]
)
def test_cuda_gives_the_indices_of_the_cpu(
    shape: tuple[int, int, int], dtype: torch.dtype, kind: str, no_sync: Callable[[], AbstractContextManager[None]]
) -> None:
    cost = torch.rand(shape, dtype=dtype) if kind == "uniform" else torch.randint(0, 9, shape).to(dtype)
    if kind == "forbidden and NaN":
        cost[torch.rand(shape) < 0.1] = INF
        cost[torch.rand(shape) < 0.1] = NAN
    cost = cost.mT.contiguous().mT
    rows, cols = (torch.randint(0, side + 1, shape[:1]) for side in shape[1:])
    expected = fastris.assignment(cost, rows, cols, maximize=True)
    on_device = cost.cuda(), rows.cuda(), cols.cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), no_sync():
        found = [fastris.assignment(*on_device, maximize=True) for _ in range(3)]
    stream.synchronize()
    for col_of_row, status in found:
        assert torch.equal(col_of_row.cpu(), expected.col_of_row)
        assert torch.equal(status.cpu(), expected.status)


@pytest.mark.gpu
def test_cuda_solves_matrices_of_two_thousand() -> None:
    cost = torch.rand(1, 2048, 2048)
    assert torch.equal(fastris.assignment(cost.cuda()).col_of_row.cpu(), fastris.assignment(cost).col_of_row)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(8, 12, 10), (2, 300, 200)])
def test_cuda_graph_capture(shape: tuple[int, int, int]) -> None:
    cost = torch.rand(shape, device="cuda")
    fastris.assignment(cost)  # loads the kernel
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = fastris.assignment(cost)
    for _ in range(3):
        cost.copy_(torch.rand_like(cost))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(found.col_of_row.cpu(), fastris.assignment(cost.cpu()).col_of_row)


@pytest.mark.gpu
def test_cuda_calls_of_two_threads_and_sizes_do_not_disturb_each_other() -> None:
    costs = [torch.rand(4, side, side, device="cuda") for side in (140, 200)]
    alone = [fastris.assignment(cost).col_of_row for cost in costs]

    def repeat(k: int) -> bool:
        return all(torch.equal(fastris.assignment(costs[k]).col_of_row, alone[k]) for _ in range(100))

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(repeat, range(2)))


@pytest.mark.parametrize(
    "cost",
    [
        np.zeros(3),
        np.zeros((2, 2, 2)),
        [[NAN, 1], [1, 2]],
        [[-INF, 1], [1, 2]],
        [[INF, 1], [INF, 2]],
        [[INF, 1], [1, INF]],
        [[NAN, INF], [1, INF]],
        np.zeros((0, 3)),
        np.zeros((3, 0)),
        [[True, False], [False, True]],
        [[3, 1, 2], [1, 3, 2]],
        [["a", "b"]],
        [[1j, 2]],
        np.arange(12.0).reshape(4, 3)[::-1, ::-1],
        np.arange(6).reshape(2, 3).T,
    ],
)
@pytest.mark.parametrize("maximize", [False, True])
def test_linear_sum_assignment_is_scipys_errors_included(each_backend: str, cost, maximize: bool) -> None:
    try:
        expected = scipy.optimize.linear_sum_assignment(cost, maximize)
    except (ValueError, TypeError) as error:
        expected_message = str(error) if isinstance(error, ValueError) else ""
        with pytest.raises(type(error)) as raised:
            fastris.linear_sum_assignment(cost, maximize)
        assert expected_message in str(raised.value)
        return
    found = fastris.linear_sum_assignment(cost, maximize)
    for ours, scipys in zip(found, expected, strict=True):
        assert isinstance(ours, np.ndarray) and ours.dtype == np.int64
        np.testing.assert_array_equal(ours, scipys)


@pytest.mark.parametrize("shape", [(1, 1), (8, 6), (6, 8), (22, 20), (20, 22), (64, 64), (300, 50)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int16])
def test_linear_sum_assignment_finds_scipys_pairs(each_backend: str, shape: tuple[int, int], dtype: type) -> None:
    random = np.random.default_rng(3)
    for _ in range(10):
        cost = (random.random(shape) * 100).astype(dtype)
        for matrix in (cost, cost[::-1, ::-1], np.asfortranarray(cost)):
            expected = scipy.optimize.linear_sum_assignment(matrix)
            np.testing.assert_array_equal(fastris.linear_sum_assignment(matrix), expected)
            tensor = torch.from_numpy(matrix.copy(order="K"))
            np.testing.assert_array_equal(torch.stack(fastris.linear_sum_assignment(tensor)), expected)


def test_linear_sum_assignment_writes_arrays_of_its_own() -> None:
    cost = np.random.default_rng(4).random((5, 3))
    before = cost.copy()
    first, second = fastris.linear_sum_assignment(cost), fastris.linear_sum_assignment(cost)
    first[0][:] = first[1][:] = -1
    assert (cost == before).all() and (np.array(second) >= 0).all()


def test_linear_sum_assignment_runs_in_four_threads_at_once() -> None:
    random = np.random.default_rng(5)
    costs = [random.random((int(random.integers(1, 60)), int(random.integers(1, 60)))) for _ in range(400)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(fastris.linear_sum_assignment, costs))
    for pairs, cost in zip(found, costs, strict=True):
        np.testing.assert_array_equal(pairs, scipy.optimize.linear_sum_assignment(cost))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_linear_sum_assignment_in_what_torch_differentiates_traces_and_extends() -> None:
    cost = torch.eye(3)

    def total(scale: torch.Tensor) -> torch.Tensor:
        return (cost * scale)[fastris.linear_sum_assignment(cost * scale, maximize=True)].sum()

    assert torch.func.grad(total)(torch.tensor(2.0)) == 3

    def columns(one: torch.Tensor) -> torch.Tensor:
        return fastris.linear_sum_assignment(one, maximize=True)[1]

    with pytest.warns(torch.jit.TracerWarning, match="integer"):  # the errors are read as the trace is made
        traced = torch.jit.trace(columns, cost, check_trace=False)
    assert traced(cost.flip(1)).tolist() == [2, 1, 0]

    class Marked(torch.Tensor):
        pass

    assert all(isinstance(one, Marked) for one in fastris.linear_sum_assignment(cost.as_subclass(Marked)))


ALONE = """
import os, resource, signal, sys
import numpy as np, torch
import fastris

torch.set_num_threads(2)
cost = np.random.default_rng(0).random((int(sys.argv[2]),) * 2)
fastris.linear_sum_assignment(np.eye(120))
if sys.argv[1] == "memory":
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + 3 * cost.nbytes // 2, resource.RLIM_INFINITY))
    try:
        fastris.linear_sum_assignment(cost)
    except MemoryError:
        print("MemoryError")
else:
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        fastris.linear_sum_assignment(cost)
        os._exit(0)
    print(os.waitpid(child, 0)[1])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of Linux's /proc and fork")
@pytest.mark.skipif(backend.native_error() is not None, reason="fastris._C is not built")
@pytest.mark.parametrize(("what", "size", "expected"), [("memory", "3000", "MemoryError"), ("fork", "120", "0")])
def test_linear_sum_assignment_runs_out_of_memory_and_forks_as_scipys_does(what: str, size: str, expected: str) -> None:
    if "libasan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("AddressSanitizer takes memory of its own")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", ALONE, what, size], capture_output=True, text=True)
    assert done.stdout.strip() == expected, done.stderr


def test_what_the_extension_is_given_has_its_size() -> None:
    if backend.native_error() is not None:
        pytest.skip("the extension is not loaded")
    for cost, rows, cols in ((bytes(7), 1, 1), (bytes(16), 1, 1), (b"", 1, 1), (b"", -1, 0), (b"", 2**30, 0)):
        with pytest.raises(ValueError, match="assign_matrix: cost must be rows x cols doubles"):
            backend.extension().assign_matrix(cost, rows, cols, False)
    with pytest.raises(TypeError):
        backend.extension().assign_matrix(bytearray(8), 1, 1, False)


def test_linear_sum_assignment_of_a_tensor_gives_tensors() -> None:
    cost = torch.rand(4, 6, dtype=torch.float64, requires_grad=True)
    rows, cols = fastris.linear_sum_assignment(cost)
    expected = scipy.optimize.linear_sum_assignment(cost.detach().numpy())
    assert rows.tolist() == expected[0].tolist() and cols.tolist() == expected[1].tolist()
    with pytest.raises(ValueError, match="expected a matrix"):
        fastris.linear_sum_assignment(cost[0])
    with pytest.raises(TypeError):
        fastris.linear_sum_assignment(torch.zeros(2, 2, dtype=torch.complex64))
