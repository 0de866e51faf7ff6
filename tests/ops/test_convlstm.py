"""convlstm: the native sequence against its reference twin in fp64, forward and backward, with all its options."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastris
from fastris import backend, convlstm, reference
from fastris.ops.conv2d_same import WINOGRAD_DTYPES, SameConvolution

NEEDS_EXTENSION = pytest.mark.skipif(backend.native_error() is not None, reason="fastris._C is not built")
BACKENDS = ["reference", pytest.param("native", marks=NEEDS_EXTENSION)]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
MEMORY = ["save", "balanced", "recompute"]
DTYPES = [  # x, cell
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
]
NAMES = ("x", "weight", "bias", "hidden", "cell", "peephole")
STATE = ("hidden", "cell")
ALL = ("bias", "hidden", "cell", "peephole")
OPTIONAL = [(), ("bias",), STATE, ("hidden",), ("cell",), ("peephole",), ALL]
EPS64 = torch.finfo(torch.float64).eps


@pytest.fixture(params=BACKENDS)
def each_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with fastris.use_backend(request.param):
        yield request.param


class Case:
    """One layer: its arguments, and gradients of its results."""

    def __init__(
        self,
        shape: Sequence[int] = (4, 2, 2, 3, 5, 4),
        dtype: torch.dtype = torch.float64,
        cell: torch.dtype | None = None,
        *,
        constant: bool = False,
        given: Sequence[str] = ALL,
        kernel: tuple[int, int] = (3, 3),
        dilation: int = 1,
        used: Sequence[int] = (0, 1, 2),
        device: str = "cpu",
    ) -> None:
        steps, batch, inputs, channels, height, width = shape
        state = (batch, channels, height, width)
        sizes = {
            "x": (batch, inputs, height, width) if constant else (steps, batch, inputs, height, width),
            "weight": (4 * channels, inputs + channels, *kernel),
            "bias": (4 * channels,),
            "hidden": state,
            "cell": state,
            "peephole": (3 * channels,),
        }
        fan_in = (inputs + channels) * kernel[0] * kernel[1]
        self.tensors: dict[str, Tensor] = {}
        for name, size in sizes.items():
            if name in ("x", "weight", *given):
                value = torch.randn(size, dtype=torch.float64) * (2 * fan_in**-0.5 if name == "weight" else 1)
                own = cell if name == "cell" and cell is not None else dtype
                self.tensors[name] = value.to(device, own).requires_grad_()
        self.steps, self.dilation, self.used = steps if constant else None, dilation, used
        wide = torch.promote_types(dtype, torch.float32)
        cell_dtype = self.tensors["cell"].dtype if "cell" in self.tensors else wide
        results = ((steps, *state), dtype), (state, dtype), (state, cell_dtype)
        grads = [torch.randn(size, dtype=torch.float64).to(device, own) for size, own in results]
        self.grads = [grad if number in used else None for number, grad in enumerate(grads)]

    def call(self, function: Callable = convlstm, tensors: dict[str, Tensor] | None = None, **options: Any) -> Any:
        given = self.tensors if tensors is None else tensors
        x, weight, bias, hidden, cell, peephole = (given.get(name) for name in NAMES)
        return function(x, weight, bias, hidden, cell, self.steps, peephole=peephole, dilation=self.dilation, **options)

    def run(self, function: Callable = convlstm, **options: Any) -> tuple[Tensor, ...]:
        """The results, and the gradients of the arguments."""
        return self.differentiate(self.call(function, **options), self.tensors, self.grads)

    def differentiate(
        self, results: Sequence[Tensor], tensors: dict[str, Tensor], grads: Sequence[Tensor | None]
    ) -> tuple[Tensor, ...]:
        """Of what has a gradient: with no steps, eager has none from the outputs, nor from a state not given."""
        leaves = list(tensors.values())
        used = [(a, grad) for a, grad in zip(results, grads, strict=True) if grad is not None and a.requires_grad]
        if not used:
            return (*results, *map(torch.zeros_like, leaves))
        found = torch.autograd.grad(
            [one for one, _ in used], leaves, [grad for _, grad in used], materialize_grads=True
        )
        return (*results, *found)

    def exact(self) -> tuple[Tensor, ...]:
        wide = {name: one.detach().double().requires_grad_() for name, one in self.tensors.items()}
        grads = [None if grad is None else grad.double() for grad in self.grads]
        return self.differentiate(self.call(reference.convlstm, wide), wide, grads)

    def three_ways(self, **options: Any) -> tuple[tuple[Tensor, ...], ...]:
        """Native, eager, and exact."""
        return self.run(**options), self.run(reference.convlstm), self.exact()

    def roundings(self) -> int:
        """Of the longest chain of sums on the way to any result or gradient, in elements."""
        x, weight = self.tensors["x"], self.tensors["weight"]
        steps = x.shape[0] if self.steps is None else self.steps
        pixels = x.shape[-4] * x.shape[-2] * x.shape[-1]
        return max(1, steps) * (weight[0].numel() + weight.shape[0] * weight[0, 0].numel() + pixels)


def assert_equal_bits(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(one, other, rtol=0, atol=0, msg=f"result {number}")


def assert_only_rounding_differs(case: Case, found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """In fp64, by no more than one rounding of the largest value for each element of the sums on the way."""
    for number, (ours, truth) in enumerate(zip(found, expected, strict=True)):
        assert ours.shape == truth.shape and ours.dtype == truth.dtype == torch.float64, number
        if truth.numel():
            assert (ours - truth).abs().max() <= EPS64 * case.roundings() * max(1, truth.abs().max()), number


# Accuracy


@NEEDS_EXTENSION
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize(("dtype", "cell"), DTYPES)
def test_no_worse_than_eager(dtype: torch.dtype, cell: torch.dtype, constant: bool, no_worse_than_eager: Any) -> None:
    case = Case((5, 2, 3, 8, 9, 7), dtype, cell, constant=constant)
    no_worse_than_eager(*case.three_ways(), recurrence=True)


@NEEDS_EXTENSION
@pytest.mark.parametrize("size", [(4, 2, 30, 30, 32, 32), (3, 2, 32, 32, 64, 64), (3, 1, 64, 64, 32, 32)])
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_worse_than_eager_where_winograd_convolves(
    size: tuple[int, ...], constant: bool, dtype: torch.dtype, no_worse_than_eager: Any
) -> None:
    if dtype not in WINOGRAD_DTYPES:
        pytest.skip("torch's own convolution in bf16 is quicker here")
    case = Case(size, dtype, torch.float32, constant=constant)
    weight, x = case.tensors["weight"], case.tensors["x"]
    assert SameConvolution(weight).by_winograd(x if constant else x[0])
    no_worse_than_eager(*case.three_ways(), recurrence=True)


@NEEDS_EXTENSION
@pytest.mark.parametrize(
    ("dtype", "constant", "steps"),
    [
        (torch.float32, False, 5),
        (torch.float32, True, 5),
        (torch.bfloat16, False, 5),
        (torch.bfloat16, True, 5),
        (torch.float16, True, 5),
        (torch.float16, False, 30),
        (torch.float16, True, 30),
        (torch.bfloat16, True, 30),
    ],
)
def test_no_worse_than_eager_from_zero(
    dtype: torch.dtype, constant: bool, steps: int, no_worse_than_eager: Any
) -> None:
    """Without a state, and with a cell in fp32."""
    case = Case((steps, 2, 3, 8, 9, 7), dtype, constant=constant, given=("bias",))
    found, eager, exact = case.three_ways()
    assert found[2].dtype == torch.float32
    no_worse_than_eager(found, eager, exact, recurrence=True)


SHAPES = [  # T, B, Cin, C, H, W
    (1, 1, 1, 1, 1, 1),
    (3, 2, 3, 5, 1, 1),
    (2, 1, 2, 30, 7, 5),
    (2, 2, 1, 1, 9, 8),
    (3, 0, 2, 3, 4, 4),
    (0, 2, 2, 3, 4, 5),
    (0, 0, 2, 3, 4, 5),
    (1, 2, 40, 3, 3, 2),
    (2, 1, 2, 130, 3, 3),
    (2, 1, 1, 2, 1, 37),
]


@NEEDS_EXTENSION
@pytest.mark.parametrize("given", [(), ALL])
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_any_shape_in_fp64(shape: tuple[int, ...], constant: bool, given: tuple[str, ...]) -> None:
    case = Case(shape, constant=constant, given=given)
    for memory in MEMORY:
        assert_only_rounding_differs(case, case.run(memory=memory), case.run(reference.convlstm))


@NEEDS_EXTENSION
@pytest.mark.parametrize("used", [(0,), (1,), (2,), (1, 2), (0, 2)])
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("given", [(), STATE])
def test_gradients_of_some_results_alone(
    used: tuple[int, ...], steps: int, constant: bool, given: tuple[str, ...]
) -> None:
    case = Case((steps, 2, 2, 3, 4, 3), constant=constant, given=given, used=used)
    for memory in MEMORY:
        assert_only_rounding_differs(case, case.run(memory=memory), case.run(reference.convlstm))


@NEEDS_EXTENSION
@pytest.mark.parametrize("kernel", [(1, 1), (2, 2), (4, 3), (1, 5), (5, 2)])
@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("constant", [False, True])
def test_any_kernel_in_fp64(kernel: tuple[int, int], dilation: int, constant: bool) -> None:
    case = Case((3, 2, 2, 3, 7, 6), constant=constant, kernel=kernel, dilation=dilation)
    assert_only_rounding_differs(case, case.run(), case.run(reference.convlstm))


@NEEDS_EXTENSION
@pytest.mark.parametrize("level", ["default", "avx2"])
def test_every_instruction_set_matches_the_reference(level: str, at_simd_level: Any) -> None:
    """In fp32, within twice eager's own error (root mean square) and a rounding of the largest value."""
    code = """
        import torch
        from fastris import convlstm, reference
        torch.manual_seed(0)
        def run(function, x, weight, state):
            leaves = [x, weight, *state]
            results = function(x, weight, None, *state, steps=3 if x.dim() == 4 else None)
            return (*results, *torch.autograd.grad([one.square().sum() for one in results], leaves))
        for channels, height, width in ((3, 5, 7), (8, 4, 3)):
            weight = (torch.randn(4 * channels, 2 + channels, 3, 3) * (2 + channels) ** -0.5).requires_grad_()
            state = [torch.randn(2, channels, height, width, requires_grad=True) for _ in range(2)]
            for lead in ((2,), (3, 2)):
                x = torch.randn(*lead, 2, height, width, requires_grad=True)
                found, eager = (run(one, x, weight, state) for one in (convlstm, reference.convlstm))
                wide = [one.detach().double().requires_grad_() for one in (x, weight, *state)]
                exact = run(reference.convlstm, wide[0], wide[1], wide[2:])
                for ours, theirs, truth in zip(found, eager, exact):
                    worst, bound = ((one.double() - truth).square().mean().sqrt() for one in (ours, theirs))
                    assert worst <= 2 * bound + torch.finfo(torch.float32).eps * truth.abs().max(), (worst, bound)
    """
    at_simd_level(level, code)


# What must be the same


@NEEDS_EXTENSION
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("given", OPTIONAL)
def test_a_sequence_is_its_two_halves(given: tuple[str, ...], constant: bool, each_backend: str) -> None:
    case = Case((5, 2, 2, 3, 5, 4), constant=constant, given=given)
    whole = case.run()
    first, second = dict(case.tensors), dict(case.tensors)
    halves = Case(given=given)
    halves.dilation = case.dilation
    halves.steps = 2 if constant else None
    if not constant:
        first["x"] = case.tensors["x"][:2]
    outputs_1, hidden, cell = halves.call(tensors=first)
    halves.steps = 3 if constant else None
    if not constant:
        second["x"] = case.tensors["x"][2:]
    outputs_2, hidden, cell = halves.call(tensors={**second, "hidden": hidden, "cell": cell})
    results = torch.cat([outputs_1, outputs_2]), hidden, cell
    assert_only_rounding_differs(case, case.differentiate(results, case.tensors, case.grads), whole)


@pytest.mark.parametrize("given", OPTIONAL)
def test_a_constant_x_is_x_repeated(given: tuple[str, ...], each_backend: str) -> None:
    case = Case(constant=True, given=given)
    constant = case.run()
    repeated = dict(case.tensors)
    repeated["x"] = case.tensors["x"].expand(4, -1, -1, -1, -1)
    case.steps = None
    results = case.call(tensors=repeated)
    assert_only_rounding_differs(case, case.differentiate(results, case.tensors, case.grads), constant)


@NEEDS_EXTENSION
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [(), ALL])
def test_the_memory_policies_give_the_same_bits(dtype: torch.dtype, constant: bool, given: tuple[str, ...]) -> None:
    case = Case((5, 2, 3, 6, 7, 5), dtype, constant=constant, given=given)
    expected = case.run(memory="save")
    for memory in MEMORY[1:]:
        assert_equal_bits(case.run(memory=memory), expected)
    with torch.no_grad():
        assert_equal_bits(case.call(), expected[:3])


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "steps": lambda one: one.repeat_interleave(2, -1)[..., ::2],
    "transposed": lambda one: one.mT.contiguous().mT,
    "channels_last": lambda one: one.transpose(-3, -1).contiguous().transpose(-3, -1),
    "time last": lambda one: one.movedim(0, -1).contiguous().movedim(-1, 0),
    "expanded over the batch": lambda one: one[..., :1, :, :, :].expand(one.shape),
    "expanded over the pixels": lambda one: one[..., :1, :1].expand(one.shape),
}


@NEEDS_EXTENSION
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("view", VIEWS)
def test_any_strides(view: str, constant: bool) -> None:
    """Of x, of the state and of the gradients, and parameters that are not contiguous."""
    case = Case((3, 2, 2, 3, 5, 4), constant=constant)
    for name in ("x", *STATE):
        case.tensors[name] = VIEWS[view](case.tensors[name].detach()).requires_grad_()
    case.grads = [VIEWS[view](grad) for grad in case.grads if grad is not None]
    weight = case.tensors["weight"].detach()
    case.tensors["weight"] = weight.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    for name in ("bias", "peephole"):
        case.tensors[name] = case.tensors[name].detach().repeat_interleave(2)[::2].requires_grad_()
    assert_only_rounding_differs(case, case.run(), case.run(reference.convlstm))


@NEEDS_EXTENSION
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("memory", MEMORY)
def test_memory_is_written_before_it_is_read(constant: bool, memory: str, poisoned_memory: Any) -> None:
    for dtype, given, kernel in ((torch.float32, (), (3, 3)), (torch.bfloat16, ALL, (2, 2))):
        case = Case((3, 2, 3, 5, 7, 5), dtype, constant=constant, given=given, kernel=kernel)
        expected = case.run(memory=memory)
        with poisoned_memory():
            found = case.run(memory=memory)
            with torch.no_grad():
                without = case.call()
        assert all(one.isfinite().all() for one in expected)
        assert_equal_bits(found, expected)
        assert_equal_bits(without, expected[:3])


@NEEDS_EXTENSION
@pytest.mark.parametrize("constant", [False, True])
def test_nan_stays_in_its_image_and_reaches_its_result(constant: bool) -> None:
    case = Case((3, 3, 2, 3, 5, 4), torch.float32, constant=constant)
    with torch.no_grad():
        case.tensors["x"][..., 1, 0, 2, 2] = float("nan")
        results = case.call()
    for result in results:
        assert result[..., 1, :, 2, 2].isnan().all()
        assert result[..., 0, :, :, :].isfinite().all() and result[..., 2, :, :, :].isfinite().all()


@NEEDS_EXTENSION
@pytest.mark.parametrize("constant", [False, True])
def test_the_result_does_not_depend_on_the_number_of_threads(constant: bool, by_threads: Any) -> None:
    case = Case((3, 2, 3, 16, 24, 23), torch.float32, constant=constant, given=("bias", "hidden", "cell"))
    results = by_threads(case.run)
    assert_equal_bits(results[1][:3], results[0][:3])
    for ours, theirs in zip(results[1][3:], results[0][3:], strict=True):  # torch's convolutions sum in another order
        bound = torch.finfo(torch.float32).eps * case.roundings() ** 0.5 * float(theirs.abs().max())
        assert (ours - theirs).abs().max() <= bound


@NEEDS_EXTENSION
def test_threads_do_not_disturb_each_other() -> None:
    cases = [Case((3, 2, 3, 8, 9, 7), torch.float32, constant=bool(number % 2)) for number in range(4)]
    expected = [case.run() for case in cases]
    found: list[list[tuple[Tensor, ...]]] = [[] for _ in cases]
    start = threading.Barrier(len(cases))

    def repeat(number: int) -> None:
        start.wait()
        for _ in range(3):
            found[number].append(cases[number].run())

    threads = [threading.Thread(target=repeat, args=(number,)) for number in range(len(cases))]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    for results, right in zip(found, expected, strict=True):
        assert len(results) == 3
        for result in results:
            assert_equal_bits(result, right)


def test_shapes_past_two_to_the_31() -> None:
    """On the meta device, which allocates nothing."""
    steps, batch, inputs, channels, side = 8, 4, 3, 64, 2**11
    x = torch.empty(steps, batch, inputs, side, side, device="meta", requires_grad=True)
    weight = torch.empty(4 * channels, inputs + channels, 3, 3, device="meta", requires_grad=True)
    state = (batch, channels, side, side)
    assert 4 * steps * batch * channels * side * side > 2**31
    outputs, hidden, cell = convlstm(x, weight)
    assert (outputs.shape, hidden.shape, cell.shape) == ((steps, *state), state, state)
    grads = torch.autograd.grad([outputs, hidden, cell], [x, weight], [outputs, hidden, cell])
    assert [one.shape for one in grads] == [x.shape, weight.shape]
    for constant in (x, x[0]):
        values = constant.detach(), weight.detach(), None, None, None, None
        results = torch.ops.fastris.convlstm(*values, steps, 1, "save")
        assert [one.shape for one in results[:3]] == [(steps, *state), state, state]
        assert results[3].shape == (steps, *state) and all(one.shape[1] == 4 * channels for one in results[4])
        found = torch.ops.fastris.convlstm_backward(
            *values, steps, 1, results[0], *results[3:], results[0], None, None, [True, True, *[False] * 4]
        )
        assert [one.shape for one in found[:2]] == [constant.shape, weight.shape]


# Memory


class Kept(TorchDispatchMode):
    """Bytes that the operator hands out for backward alone, and how often it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.bytes = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        if function is torch.ops.fastris.convlstm.default:
            self.calls += 1
            self.bytes += sum(one.numel() * one.element_size() for one in (results[3], *results[4]))
        return results


def kept(case: Case, **options: Any) -> int:
    with Kept() as mode:
        case.call(**options)
    assert mode.calls == 1
    return mode.bytes


@NEEDS_EXTENSION
@pytest.mark.parametrize("given", [(), ALL])
@pytest.mark.parametrize("constant", [False, True])
def test_each_memory_policy_keeps_less_than_the_one_before(constant: bool, given: tuple[str, ...]) -> None:
    steps, batch, channels, height, width = 9, 2, 3, 5, 4
    case = Case((steps, batch, 2, channels, height, width), torch.float32, constant=constant, given=given)
    state = batch * channels * height * width * 4
    save, balanced, recompute = (kept(case, memory=memory) for memory in MEMORY)
    # Cells, and the hoisted part that a constant x has in any case; of the gates all, three fifths, or none.
    at_least = state * steps + (4 * state if constant else 0)
    moving = steps - (constant and "hidden" not in given)
    assert recompute == at_least
    assert save == at_least + 4 * state * moving
    assert recompute < balanced < save
    assert abs(balanced - at_least - 4 * state * moving * 3 / 5) <= 4 * state / 2
    assert kept(case) == balanced


@NEEDS_EXTENSION
def test_inference_keeps_nothing() -> None:
    for constant in (False, True):
        case = Case((5, 2, 2, 3, 5, 4), torch.float32, constant=constant)
        with torch.no_grad():
            assert [kept(case, memory=memory) for memory in MEMORY] == [0, 0, 0]
        with torch.inference_mode():
            assert kept(case) == 0
        case.tensors = {name: one.detach() for name, one in case.tensors.items()}
        assert kept(case) == 0
        case.tensors["peephole"].requires_grad_()
        assert kept(case) > 0


# Autograd


@NEEDS_EXTENSION
@pytest.mark.parametrize(
    ("given", "memory"),
    [((), "save"), ((), "balanced"), (("hidden",), "balanced"), (("cell",), "recompute"), *((ALL, m) for m in MEMORY)],
)
@pytest.mark.parametrize("constant", [False, True])
def test_gradients_in_fp64(constant: bool, given: tuple[str, ...], memory: str) -> None:
    case = Case((3, 1, 1, 2, 3, 2), constant=constant, given=given)
    check_gradients(case, memory)


@NEEDS_EXTENSION
@pytest.mark.parametrize(("kernel", "dilation"), [((1, 1), 1), ((2, 2), 1), ((2, 3), 2), ((3, 1), 2), ((4, 2), 1)])
@pytest.mark.parametrize("constant", [False, True])
def test_gradients_in_fp64_of_any_kernel(kernel: tuple[int, int], dilation: int, constant: bool) -> None:
    check_gradients(Case((3, 2, 1, 1, 3, 4), constant=constant, kernel=kernel, dilation=dilation), "balanced")


@NEEDS_EXTENSION
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("used", [(0,), (1,), (2,), (1, 2)])
def test_gradients_in_fp64_of_some_results(used: tuple[int, ...], memory: str) -> None:
    for constant in (False, True):
        check_gradients(Case((3, 1, 1, 1, 3, 2), constant=constant, used=used), memory)


def check_gradients(case: Case, memory: str) -> None:
    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        results = case.call(tensors=dict(zip(case.tensors, leaves, strict=True)), memory=memory)
        return tuple(results[number] for number in case.used)

    assert torch.autograd.gradcheck(function, tuple(case.tensors.values()), fast_mode=True)


@NEEDS_EXTENSION
def test_only_the_gradients_asked_for() -> None:
    for constant in (False, True):
        case = Case(constant=constant)
        expected = dict(zip(case.tensors, case.run(reference.convlstm)[3:], strict=True))
        for name in NAMES:
            for other, one in case.tensors.items():
                one.requires_grad_(other == name)
                one.grad = None
            torch.autograd.backward(case.call(), case.grads)
            found = case.tensors[name].grad
            assert found is not None
            assert_only_rounding_differs(case, [found], [expected[name]])
            assert all(one.grad is None for other, one in case.tensors.items() if other != name)


@NEEDS_EXTENSION
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("given", [(), ALL])
def test_a_graph_that_is_kept_gives_the_same_gradients_twice(
    constant: bool, given: tuple[str, ...], memory: str
) -> None:
    case = Case((4, 2, 2, 3, 5, 4), torch.float32, constant=constant, given=given)
    results = case.call(memory=memory)
    before = [one.detach().clone() for one in results]
    leaves = list(case.tensors.values())
    grads = [grad.clone() for grad in case.grads if grad is not None]
    first = torch.autograd.grad(results, leaves, case.grads, retain_graph=True)
    assert_equal_bits(case.grads, grads)  # type: ignore[arg-type]  # nobody has written on them
    second = torch.autograd.grad(results, leaves, case.grads)
    assert_equal_bits(second, first)
    assert_equal_bits([one.detach() for one in results], before)


def test_second_derivatives_are_refused_or_right() -> None:
    case = Case((2, 1, 1, 1, 2, 2))

    def both() -> tuple[Tensor, ...]:
        leaves = list(case.tensors.values())
        first = torch.autograd.grad(case.call(), leaves, case.grads, create_graph=True)
        return torch.autograd.grad(sum(one.square().sum() for one in first), leaves)

    with fastris.use_backend("reference"):
        assert all(one.isfinite().all() and one.ne(0).any() for one in both())
    if backend.native_error() is None:
        with pytest.raises(RuntimeError, match="convlstm: the native operator has no second derivatives"):
            both()


@NEEDS_EXTENSION
@pytest.mark.parametrize("memory", MEMORY)
def test_changing_the_results_in_place_is_refused_or_harmless(memory: str) -> None:
    """Backward reads the outputs; the last state is a copy."""
    case = Case()
    leaves = list(case.tensors.values())
    results = case.call(memory=memory)
    expected = torch.autograd.grad(results, leaves, case.grads, retain_graph=True)
    with torch.no_grad():
        for last in results[1:]:
            last.detach().zero_()
    assert_equal_bits(torch.autograd.grad(results, leaves, case.grads), expected)

    def changed() -> None:
        results = case.call(memory=memory)
        results[0].mul_(2)
        torch.autograd.grad(results, leaves, case.grads)

    with pytest.raises(RuntimeError, match="(?i)in-?place"):
        changed()


# Back ends, autocast, compilation


@NEEDS_EXTENSION
def test_use_backend_gives_the_same_loss_and_gradients() -> None:
    module = fastris.ConvLSTM(3, [4, 5], (3, 3), 2, peephole=True).double()
    with torch.no_grad():
        for one in module.parameters():
            one.copy_(torch.randn_like(one) * 0.3)
    x = torch.randn(4, 2, 3, 6, 5, dtype=torch.float64)
    found = []
    for name in ("reference", "native"):
        with fastris.use_backend(name), torch.profiler.profile(acc_events=True) as profile:
            outputs, states = module(x)
            loss = outputs[0].square().mean() + sum(one.mean() for one in states[0])
            found.append((loss.detach(), *torch.autograd.grad(loss, list(module.parameters()))))
        assert any("fastris" in event.key for event in profile.key_averages()) == (name == "native")
    for ours, theirs in zip(*found, strict=True):
        roundings = 4 * (9 * 9 + 9 * 20 + 60)
        assert (ours - theirs).abs().max() <= EPS64 * roundings * max(1, float(theirs.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("given", [("bias",), ALL])
def test_autocast(
    dtype: torch.dtype, constant: bool, given: tuple[str, ...], each_backend: str, no_worse_than_eager: Any
) -> None:
    """Half results beside a cell in fp32, and gradients in fp32, on either back end."""
    case = Case((4, 2, 3, 8, 9, 7), torch.float32, constant=constant, given=given)
    with torch.autocast("cpu", dtype=dtype):
        results = case.call()
    assert [one.dtype for one in results] == [dtype, dtype, torch.float32]
    found = torch.autograd.grad(
        results,
        list(case.tensors.values()),
        [grad.to(one.dtype) for grad, one in zip(case.grads, results, strict=True)],
    )
    assert all(one.dtype == torch.float32 for one in found)
    cast = {name: one.to(dtype) for name, one in case.tensors.items() if name not in ("cell", "peephole")}
    whole = {name: one for name, one in case.tensors.items() if name in ("cell", "peephole")}
    given_tensors = {name: {**cast, **whole}[name] for name in case.tensors}
    eager = case.call(reference.convlstm, given_tensors)
    leaves = list(case.tensors.values())
    grads = [grad.to(one.dtype) for grad, one in zip(case.grads, eager, strict=True)]
    eager_grads = torch.autograd.grad(eager, leaves, grads)
    if each_backend == "reference":
        assert_equal_bits((*results, *found), (*eager, *eager_grads))
        return
    # Of the sequence of half tensors, which is what both compute.
    wide = {name: one.detach().double().requires_grad_() for name, one in given_tensors.items()}
    exact = case.differentiate(case.call(reference.convlstm, wide), wide, [grad.double() for grad in grads])
    no_worse_than_eager((*results, *found), (*eager, *eager_grads), exact, recurrence=True)


def test_autocast_leaves_fp64_alone(each_backend: str) -> None:
    case = Case()
    expected = case.run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = case.run()
    assert_equal_bits(found, expected)


@NEEDS_EXTENSION
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("constant", "dtype", "given"), [(True, torch.float64, ALL), (False, torch.bfloat16, ()), (True, torch.float32, ())]
)
def test_opcheck(constant: bool, dtype: torch.dtype, given: tuple[str, ...], device: str) -> None:
    """Symbolic shapes take long: with one memory policy and in one case only."""
    case = Case((2, 2, 2, 3, 4, 5), dtype, constant=constant, given=given, device=device)
    ops = torch.ops.fastris
    quick = ("test_schema", "test_autograd_registration", "test_faketensor")
    symbolic = ("test_aot_dispatch_dynamic",)
    values = [case.tensors.get(name) for name in NAMES]
    for memory in ("none", *MEMORY):
        arguments = [one.detach() if one is not None and memory == "none" else one for one in values]
        tests = (*quick, *symbolic) if memory == "balanced" and dtype == torch.float32 else quick
        torch.library.opcheck(ops.convlstm.default, (*arguments, 2, 1, memory), test_utils=tests)
    detached = [None if one is None else one.detach() for one in values]
    outputs, _, _, cells, kept = ops.convlstm(*detached, 2, 1, "balanced")
    d_outputs, d_hidden, d_cell = (None if one is None else one for one in case.grads)
    needed = [one is not None for one in values]
    for grads, wanted in (((d_outputs, d_hidden, d_cell), needed), ((None, None, d_cell), [True] + [False] * 5)):
        arguments = (*detached, 2, 1, outputs, cells, kept, *grads, wanted)
        torch.library.opcheck(ops.convlstm_backward.default, arguments, test_utils=quick)


@pytest.mark.parametrize("constant", [False, True])
def test_compiles_to_one_graph_on_each_backend(constant: bool, each_backend: str) -> None:
    torch.compiler.reset()
    for shape, given in (((3, 2, 2, 3, 5, 4), ALL), ((2, 1, 2, 3, 4, 6), ())):
        case = Case(shape, constant=constant, given=given)
        compiled = torch.compile(convlstm, fullgraph=True, backend="aot_eager")
        assert_only_rounding_differs(case, case.run(compiled), case.run())


def test_the_module_compiles_to_one_graph_on_each_backend(each_backend: str) -> None:
    torch.compiler.reset()
    module: nn.Module = fastris.ConvLSTM(2, [3, 4], (3, 3), 2, peephole=True).double()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    sequence, image = torch.randn(3, 2, 2, 5, 4, dtype=torch.float64), torch.randn(2, 2, 5, 4, dtype=torch.float64)
    for arguments in ((sequence,), (image, None, 3)):
        found = []
        for one in (compiled, module):
            outputs, states = one(*arguments)
            loss = outputs[0].square().sum() + sum(state.sum() for state in states[0])
            found.append((loss.detach(), *torch.autograd.grad(loss, list(module.parameters()))))
        for ours, theirs in zip(*found, strict=True):
            bound = EPS64 * 3 * (9 * 7 + 9 * 16 + 40) * max(1, float(theirs.abs().max()))
            assert (ours - theirs).abs().max() <= bound


def test_nothing_asks_whether_there_is_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler of torch 2.11 cannot trace that."""
    monkeypatch.setattr(torch.amp, "is_autocast_available", None)
    convlstm(**good())
    fastris.ConvLSTM(2, [3], (3, 3), 1)(torch.zeros(1, 2, 2, 4, 5))
    convlstm(torch.zeros(2, 1, 3, 4, 5, device="meta"), torch.zeros(8, 5, 3, 3, device="meta"))


# Wrong arguments


def good() -> dict[str, Any]:
    return {
        "x": torch.zeros(2, 1, 3, 4, 5),
        "weight": torch.zeros(8, 5, 3, 3),
        "bias": torch.zeros(8),
        "hidden": torch.zeros(1, 2, 4, 5),
        "cell": torch.zeros(1, 2, 4, 5),
        "peephole": torch.zeros(6),
    }


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(3, 4, 5)}, ValueError, r"x must be floating .*got float32 \(3,4,5\)"),
        ({"x": torch.zeros(2, 1, 3, 4, 5).int()}, ValueError, "x must be floating .*got int32"),
        ({"x": None}, TypeError, "x must be a tensor.*got NoneType"),
        ({"x": torch.zeros(2, 1, 2, 4, 5)}, ValueError, r"weight must have 2 \+ 2 input channels for this x, got 5"),
        ({"weight": torch.zeros(7, 5, 3, 3)}, ValueError, r"weight must be \(4C, Cin \+ C, kh, kw\)"),
        ({"weight": torch.zeros(8, 5, 0, 3)}, ValueError, "weight must be"),
        ({"weight": torch.zeros(8, 5, 3)}, ValueError, "weight must be"),
        ({"weight": [1]}, TypeError, "weight must be a tensor"),
        ({"weight": torch.zeros(8, 5, 3, 3).double()}, ValueError, "weight must be torch.float32 like x"),
        ({"weight": torch.zeros(8, 5, 3, 3, device="meta")}, ValueError, "weight must be on cpu like x, got meta"),
        ({"bias": torch.zeros(2)}, ValueError, r"bias must be \(8,\), got float32 \(2"),
        ({"bias": torch.zeros(8).half()}, ValueError, "bias must be torch.float32 like x, got torch.float16"),
        ({"bias": 0.5}, TypeError, "bias must be a tensor"),
        ({"hidden": torch.zeros(2, 2, 4, 5)}, ValueError, r"hidden must be \(1, 2, 4, 5\)"),
        ({"hidden": torch.zeros(1, 2, 4, 5).double()}, ValueError, "hidden must be torch.float32 like x"),
        ({"cell": torch.zeros(1, 3, 4, 5)}, ValueError, r"cell must be \(1, 2, 4, 5\)"),
        ({"cell": torch.zeros(1, 2, 4, 5).double()}, ValueError, "cell must be torch.float32 like x or float32, got"),
        ({"peephole": torch.zeros(8)}, ValueError, r"peephole must be \(6,\)"),
        ({"steps": 2}, ValueError, "steps goes with a constant x"),
        ({"x": torch.zeros(1, 3, 4, 5)}, ValueError, "steps goes with a constant x .*needed there"),
        ({"x": torch.zeros(1, 3, 4, 5), "steps": -1}, ValueError, "steps must be an integer from 0, got -1"),
        ({"x": torch.zeros(1, 3, 4, 5), "steps": 1.5}, ValueError, "steps must be an integer from 0, got 1.5"),
        ({"dilation": 0}, ValueError, "dilation must be an integer from 1, got 0"),
        ({"dilation": (1, 1)}, ValueError, "dilation must be an integer"),
        ({"memory": "none"}, ValueError, "memory must be 'save', 'balanced' or 'recompute', got 'none'"),
    ],
)
def test_wrong_arguments_are_named(
    changes: dict[str, Any], error: type[Exception], message: str, each_backend: str
) -> None:
    convlstm(**good())
    with pytest.raises(error, match="convlstm: " + message):
        convlstm(**{**good(), **changes})


@pytest.mark.gpu
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize(
    "shape", [(5, 2, 3, 8, 9, 7), (2, 1, 4, 64, 17, 33), (3, 3, 30, 30, 16, 16), (2, 1, 3, 80, 5, 6)]
)
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize(("dtype", "cell"), DTYPES)
def test_cuda_is_no_worse_than_eager(
    dtype: torch.dtype,
    cell: torch.dtype,
    constant: bool,
    shape: tuple[int, ...],
    memory: str,
    no_worse_than_eager: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A constant x in bf16 and fp16 with no more than 64 channels goes by the fused step. No TF32 for either."""
    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee")
    case = Case(shape, dtype, cell, constant=constant, device="cuda")
    no_worse_than_eager(*case.three_ways(memory=memory), recurrence=True)
