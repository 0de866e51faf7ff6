"""lstm_gates: the native operator against its reference twin in fp64, forward and backward, whatever the layout."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import fastris
from fastris import backend, lstm_gates, reference

NEEDS_EXTENSION = pytest.mark.skipif(backend.native_error() is not None, reason="fastris._C is not built")
BACKENDS = ["reference", pytest.param("native", marks=NEEDS_EXTENSION)]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
DTYPES = [  # gates, cell
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
]
SHAPES = [  # B, C, H, W
    (1, 1, 1, 1),
    (2, 3, 5, 7),  # a tile of state that is no whole number of vectors
    (2, 30, 1, 1),
    (3, 1, 7, 9),
    (1, 30, 9, 11),
    (1, 1, 1, 1037),  # rows longer than two tiles, NCHW
    (2, 3, 19, 23),
    (1, 700, 3, 1),  # and channels_last
    (5, 64, 2, 2),  # the longest short row of channels_last, and one more
    (5, 65, 2, 2),
    (0, 4, 3, 3),
    (2, 2, 0, 3),
    (2, 2, 3, 0),
]
OPTIONAL = [(), ("addend",), ("bias",), ("peephole",), ("addend", "bias", "peephole")]
ALL = OPTIONAL[-1]
FP64_ROUNDINGS = 64 * torch.finfo(torch.float64).eps  # twice as many as there are operations on the way to a result
SATURATION = 1.01 * math.exp(-69)
"""In fp32 a product of a sigmoid and a tanh may be 0 below e^-67, and sigmoids are no smaller than e^-78. What these
tests have is smaller than both or far larger, so that no error may be larger than this."""


@pytest.fixture(params=BACKENDS)
def each_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with fastris.use_backend(request.param):
        yield request.param


def arguments_of(
    shape: Sequence[int],
    gates: torch.dtype,
    cell: torch.dtype | None = None,
    given: Sequence[str] = ALL,
    layout: torch.memory_format = torch.contiguous_format,
    parameters: torch.dtype | None = None,
    device: str = "cpu",
) -> list[Tensor | None]:
    """Leaves gates, cell_prev, addend, bias, peephole; those not given are None."""
    batch, channels, height, width = shape
    sizes: dict[str, tuple[int, ...]] = {
        "gates": (batch, 4 * channels, height, width),
        "cell_prev": (batch, channels, height, width),
        "addend": (batch, 4 * channels, height, width),
        "bias": (4 * channels,),
        "peephole": (3 * channels,),
    }
    arguments: list[Tensor | None] = []
    for name, size in sizes.items():
        if name not in ("gates", "cell_prev", *given):
            arguments.append(None)
            continue
        dtype = {"cell_prev": cell, "bias": parameters, "peephole": parameters}.get(name) or gates
        value = torch.randn(size, dtype=torch.float64).mul(2).to(device, dtype)
        value = value.contiguous(memory_format=layout) if len(size) == 4 else value
        arguments.append(value.requires_grad_())
    return arguments


def gradients_of_results(arguments: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    gates, cell = arguments[:2]
    assert gates is not None and cell is not None
    return torch.randn_like(cell, dtype=gates.dtype), torch.randn_like(cell)


def run(function: Callable, arguments: Sequence[Tensor | None], grads: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """hidden, cell, and the gradients of the arguments; no gradient comes from a result where it is None."""
    results = function(*arguments)
    used = [(result, grad) for result, grad in zip(results, grads, strict=True) if grad is not None]
    leaves = [one for one in arguments if one is not None]
    return (*results, *torch.autograd.grad([one for one, _ in used], leaves, [grad for _, grad in used]))


def widened(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if one is None else one.detach().double().requires_grad_(one.requires_grad) for one in tensors]


def three_ways(arguments: Sequence[Tensor | None], grads: Sequence[Tensor | None]) -> tuple[tuple[Tensor, ...], ...]:
    """Native, eager, and exact."""
    return (
        run(lstm_gates, arguments, grads),
        run(reference.lstm_gates, arguments, grads),
        run(reference.lstm_gates, widened(arguments), widened(grads)),
    )


def assert_equal_bits(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True, msg=f"result {number}")


# Accuracy


@NEEDS_EXTENSION
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("given", OPTIONAL)
@pytest.mark.parametrize(("gates", "cell"), DTYPES[1:])
def test_no_worse_than_eager(
    gates: torch.dtype, cell: torch.dtype, given: tuple[str, ...], layout: torch.memory_format, no_worse_than_eager: Any
) -> None:
    arguments = arguments_of((3, 30, 9, 11), gates, cell, given, layout)
    no_worse_than_eager(*three_ways(arguments, gradients_of_results(arguments)))


@NEEDS_EXTENSION
@pytest.mark.parametrize("used", [(True, False), (False, True)])
@pytest.mark.parametrize(("gates", "cell"), DTYPES[1:])
def test_gradients_of_one_result_alone(
    gates: torch.dtype, cell: torch.dtype, used: tuple[bool, bool], no_worse_than_eager: Any
) -> None:
    arguments = arguments_of((2, 5, 13, 11), gates, cell)
    grads = [grad if wanted else None for grad, wanted in zip(gradients_of_results(arguments), used, strict=True)]
    if not used[0]:  # o has a part in the hidden state alone: its peephole's gradient is zero either way
        assert run(lstm_gates, arguments, grads)[-1][10:].eq(0).all()
    no_worse_than_eager(*three_ways(arguments, grads))


@NEEDS_EXTENSION
@pytest.mark.parametrize(
    ("gates", "cell", "addend", "parameters"),
    [
        (torch.bfloat16, torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float16, torch.float16, torch.float16, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32, torch.float32),
        (torch.float32, torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16, torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float64, torch.bfloat16, torch.float32),
        (torch.float32, torch.float64, torch.float32, torch.float64),
        (torch.float32, torch.float32, torch.float64, torch.float32),
    ],
)
def test_mixed_dtypes(
    gates: torch.dtype, cell: torch.dtype, addend: torch.dtype, parameters: torch.dtype, no_worse_than_eager: Any
) -> None:
    arguments = arguments_of((2, 5, 13, 11), gates, cell, parameters=parameters)
    assert arguments[2] is not None
    arguments[2] = arguments[2].detach().to(addend).requires_grad_()
    no_worse_than_eager(*three_ways(arguments, gradients_of_results(arguments)))


@NEEDS_EXTENSION
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_in_fp64_only_rounding_differs(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    arguments = arguments_of(shape, torch.float64, layout=layout)
    grads = gradients_of_results(arguments)
    found, expected = (run(function, arguments, grads) for function in (lstm_gates, reference.lstm_gates))
    for ours, truth in zip(found, expected, strict=True):
        assert ours.shape == truth.shape
        if truth.numel():
            summed = shape[0] * shape[2] * shape[3] if truth.dim() == 1 else 1
            assert (ours - truth).abs().max() <= FP64_ROUNDINGS * summed * max(1, truth.abs().max())


def activations(values: Tensor) -> tuple[Tensor, Tensor]:
    """sigmoid and tanh of the values as the operator computes them: σ(o)·1 is its hidden state, 1·tanh(g) its cell."""
    row = values.view(1, 1, 1, -1)
    large, zero = torch.full_like(row, 100.0), torch.zeros_like(row)
    hidden, _ = lstm_gates(torch.cat([large, large, row, large], 1), large)
    _, cell = lstm_gates(torch.cat([large, zero, zero, row], 1), zero)
    return hidden.flatten(), cell.flatten()


def grid() -> Tensor:
    """Every 2¹²-th float from 1e-38 to 20, and a fine grid where e^r − 1 goes over to the next power, of both signs."""
    first, last = torch.tensor([1e-38, 20.0]).view(torch.int32).tolist()
    spread = torch.arange(first, last, 4096, dtype=torch.int32).view(torch.float32)
    around = torch.linspace(0.1, 0.6, 100_000)
    return torch.cat([spread, around, -spread, -around, torch.zeros(1)])


@NEEDS_EXTENSION
def test_relative_error_of_the_activations_over_all_scales() -> None:
    values = grid()
    exact = values.double().sigmoid(), values.double().tanh()
    eps = torch.finfo(torch.float32).eps
    for ours, theirs, truth in zip(activations(values), (values.sigmoid(), values.tanh()), exact, strict=True):
        scale = truth.abs().clamp_min(torch.finfo(torch.float32).tiny)
        our_errors, their_errors = ((one.double() - truth).abs() / scale for one in (ours, theirs))
        assert our_errors.max() <= 2 * eps  # twice the unit in the last place that torch's own functions promise
        assert our_errors.square().mean().sqrt() <= 2 * their_errors.square().mean().sqrt()
    near = values.abs() < 0.625
    small = ours[near].double(), exact[1][near]
    roundings = 4 if torch.backends.cpu.get_cpu_capability() == "DEFAULT" else 3  # a product and a sum are one, or not
    assert ((small[0] - small[1]).abs() <= roundings / 2 * eps * small[1].abs()).all()  # where tanh x is about x


@NEEDS_EXTENSION
def test_relative_error_of_the_slopes() -> None:
    """Also where the activation itself rounds to 1, and one less that, or less its square, to 0."""
    values = torch.linspace(-60, 60, 100_001)
    row, large = values.view(1, 1, 1, -1), torch.full((1, 1, 1, len(values)), 100.0)
    of_sigmoid, of_tanh = torch.cat([row, large, large, large], 1), torch.cat([large, large, large, row / 2], 1)
    exponential = values.double().abs().neg().exp()
    exact = exponential / (1 + exponential).square()  # σ'(x), and a quarter of tanh'(x/2)
    for gates, channel, scale in ((of_sigmoid, 0, 1), (of_tanh, 3, 4)):
        gates.requires_grad_()
        _, cell = lstm_gates(gates, torch.zeros_like(row))
        (found,) = torch.autograd.grad(cell.sum(), gates)
        error = (found[0, channel, 0].double() / scale - exact).abs() / exact
        assert error.max() <= 4 * torch.finfo(torch.float32).eps  # three products of what errs by one and a half each


@NEEDS_EXTENSION
def test_activations_are_bounded_symmetric_and_keep_the_sign_of_zero() -> None:
    values = torch.cat([grid(), torch.tensor([1e4, 1e38, float("inf")])])
    sigmoid, tanh = activations(values)
    mirrored_sigmoid, mirrored_tanh = activations(-values)
    assert sigmoid.ge(0).all() and sigmoid.le(1).all() and tanh.abs().le(1).all()
    assert torch.equal(mirrored_tanh, -tanh)
    assert (sigmoid + mirrored_sigmoid - 1).abs().max() <= 2 * torch.finfo(torch.float32).eps  # two roundings
    exact = torch.tensor([1e4, 1e38, float("inf"), -1e4, -1e38, -float("inf")])
    sigmoid, tanh = activations(exact)
    assert tanh.tolist() == [1, 1, 1, -1, -1, -1]
    assert sigmoid[:3].tolist() == [1, 1, 1] and sigmoid[3:].le(SATURATION).all()


@NEEDS_EXTENSION
@pytest.mark.parametrize(("gates", "cell"), DTYPES)
@pytest.mark.parametrize("size", [1e-7, 50.0, 1e4, float("inf")])
def test_small_and_large_pre_activations(
    size: float, gates: torch.dtype, cell: torch.dtype, no_worse_than_eager: Any
) -> None:
    """All 16 combinations of signs."""
    signs = torch.tensor([[(n >> k & 1) * 2.0 - 1 for n in range(16)] for k in range(4)], dtype=torch.float64)
    values = (signs * size).view(1, 4, 1, 16).to(gates).requires_grad_()
    cell_prev = torch.linspace(-2, 2, 16, dtype=torch.float64).view(1, 1, 1, 16).to(cell).requires_grad_()
    arguments = [values, cell_prev, None, None, None]
    grads = gradients_of_results(arguments)
    found, eager, exact = three_ways(arguments, grads)
    assert all(one.isfinite().all() for one in found)
    # A sigmoid goes through at most two factors: of the gradients, and c_prev.
    factors = (1 + sum(float(grad.abs().max()) for grad in grads)) * (1 + float(cell_prev.detach().abs().max()))
    # And 1 − σ is rounded in the exact results, where σ is near 1.
    rounded = torch.finfo(torch.float64).eps
    no_worse_than_eager(found, eager, exact, saturation=(2 * SATURATION + rounded) * factors)


@NEEDS_EXTENSION
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, 0x7FFFFFFF, 0x7F800001, -1, -0x400000])
@pytest.mark.parametrize("gate", range(4))
def test_any_nan_of_a_gate_reaches_the_results_and_no_neighbour(gate: int, bits: int) -> None:
    """0x7fffffff is the NaN of a GPU, and -0x400000 that of an x86 processor."""
    gates = torch.randn(2, 12, 3, 7)
    gates.view(2, 4, 3, 3, 7)[1, gate, 2, 1, 4] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    gates.requires_grad_()
    cell_prev = torch.randn(2, 3, 3, 7, requires_grad=True)
    expected = torch.zeros(2, 3, 3, 7, dtype=torch.bool)
    expected[1, 2, 1, 4] = True
    hidden, cell = lstm_gates(gates, cell_prev)
    assert torch.equal(hidden.isnan(), expected)
    assert torch.equal(cell.isnan(), expected & (gate != 2))  # o has no part in the cell
    d_gates, d_cell_prev = torch.autograd.grad([hidden, cell], [gates, cell_prev], [torch.ones_like(cell)] * 2)
    assert torch.equal(d_gates.isnan().view(2, 4, 3, 3, 7).any(1), expected)
    assert torch.equal(d_cell_prev.isnan(), expected)


@NEEDS_EXTENSION
@pytest.mark.parametrize("level", ["default", "avx2"])
def test_every_instruction_set_is_no_worse_than_eager(level: str, at_simd_level: Any) -> None:
    """In shapes that leave part of a vector, and with the processor's own as the exact result for fp64."""
    code = """
        import torch
        from fastris import lstm_gates, reference
        def run(function, arguments, grads):
            results = function(*arguments)
            return (*results, *torch.autograd.grad(results, arguments, grads))
        torch.manual_seed(0)
        shapes = [(2, 3, 5, 7), (3, 30, 9, 11), (1, 700, 3, 1)]
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            for layout in (torch.contiguous_format, torch.channels_last):
                worst, bound = torch.zeros(7, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)
                for batch, channels, height, width in 3 * shapes:  # one largest error may be small by chance
                    sizes = [4 * channels, channels, 4 * channels]
                    arguments = [2 * torch.randn(batch, size, height, width) for size in sizes]
                    arguments = [one.to(dtype).contiguous(memory_format=layout) for one in arguments]
                    arguments += [torch.randn(size * channels, dtype=dtype) for size in (4, 3)]
                    arguments = [one.requires_grad_() for one in arguments]
                    grads = [torch.randn_like(arguments[1]) for _ in range(2)]
                    found, eager = (run(one, arguments, grads) for one in (lstm_gates, reference.lstm_gates))
                    wide = [one.detach().double().requires_grad_() for one in arguments]
                    exact = run(reference.lstm_gates, wide, [one.double() for one in grads])
                    for k, (ours, theirs, truth) in enumerate(zip(found, eager, exact, strict=True)):
                        for one, errors in ((ours, worst), (theirs, bound)):
                            error = (one.double() - truth).detach().abs().max() / truth.detach().abs().max()
                            errors[k] = torch.maximum(errors[k], error)  # NaN stays
                rounding = torch.finfo(dtype).eps
                if dtype == torch.float64:
                    rounding *= 64 * 3 * 9 * 11
                assert (worst <= 2 * bound + rounding).all(), (dtype, layout, worst, bound)
    """
    at_simd_level(level, code)


# Shapes, layouts, memory


def crop(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The first elements of a tensor of (B, kC, H, W) or (kC,), with k blocks of channels, as a view where it can."""
    batch, channels, height, width = shape
    if tensor.dim() == 1:
        blocks = tensor.view(-1, channels + 1)
        return blocks[:, :channels].reshape(-1)
    blocks = tensor.view(batch + 1, -1, channels + 1, height + 1, width + 3)[:batch, :, :channels, :height, :width]
    return blocks[:, 0] if blocks.shape[1] == 1 else blocks.flatten(1, 2)


@NEEDS_EXTENSION
@pytest.mark.parametrize(("gates", "cell"), [DTYPES[0], DTYPES[1], DTYPES[3], DTYPES[4]])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_element_does_not_depend_on_what_is_around_it(
    shape: tuple[int, ...], gates: torch.dtype, cell: torch.dtype
) -> None:
    """The same bits as in a larger tensor, in either layout and as a view: every element takes the same arithmetic."""
    batch, channels, height, width = shape
    whole = arguments_of((batch + 1, channels + 1, height + 1, width + 3), gates, cell)
    grads = gradients_of_results(whole)
    part = [crop(one, shape) for one in (*run(lstm_gates, whole, grads)[:5],)]
    leaves = [None if one is None else one.detach() for one in whole]
    for view in (
        lambda one: one,
        lambda one: one.contiguous(),
        lambda one: one.contiguous(memory_format=torch.channels_last) if one.dim() == 4 else one,
    ):
        arguments = [None if one is None else view(crop(one, shape)).detach().requires_grad_() for one in leaves]
        found = run(lstm_gates, arguments, [view(crop(one, shape)) for one in grads])
        assert_equal_bits(found[:5], part)


@NEEDS_EXTENSION
@pytest.mark.parametrize("given", [(), ("addend",), ("addend", "peephole")])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1037), (2, 4, 16, 16), (3, 2, 17, 32), (1, 5, 40, 9)])
def test_where_pre_activations_lie_changes_no_bit(shape: tuple[int, ...], given: tuple[str, ...]) -> None:
    """Tiles of whole vectors are read and written in place, but for such with a bias: those are summed in buffers."""
    arguments = arguments_of(shape, torch.float32, given=given)
    grads = gradients_of_results(arguments)
    found = run(lstm_gates, arguments, grads)
    arguments[3] = torch.zeros(4 * shape[1], requires_grad=True)
    summed = run(lstm_gates, arguments, grads)
    number_of_bias = 2 + sum(one is not None for one in arguments[:3])
    assert_equal_bits(found, summed[:number_of_bias] + summed[number_of_bias + 1 :])


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "steps": lambda one: one[::2, :, 1:-1, ::3],
    "transposed": lambda one: one.mT,
    "flipped": lambda one: one.flip(-1),
    "expanded over the batch": lambda one: one[:1].expand(one.shape),
    "expanded over the pixels": lambda one: one[..., :1, :1].expand(one.shape),
    "channels_last": lambda one: one.contiguous(memory_format=torch.channels_last),
    "a slice of channels_last": lambda one: one.contiguous(memory_format=torch.channels_last)[..., 1:, :],
}


@NEEDS_EXTENSION
@pytest.mark.parametrize("gates_view", VIEWS)
@pytest.mark.parametrize("others_view", VIEWS)
def test_any_strides(gates_view: str, others_view: str) -> None:
    """Of the gates and, independently, of all that goes with them and of the gradients."""
    shapes: list[Tensor] = [torch.randn(4, channels, 6, 6) for channels in (12, 3, 12, 3, 3)]
    if (gates_view == "steps") != (others_view == "steps") or ("slice" in gates_view) != ("slice" in others_view):
        others_view = gates_view  # these change the shape
    gates, *rest = (VIEWS[gates_view if k == 0 else others_view](one) for k, one in enumerate(shapes))
    bias, peephole = torch.randn(24)[::2], torch.randn(9).flip(0)
    views = [gates, rest[0], rest[1], bias, peephole]
    dense = [one.clone(memory_format=torch.contiguous_format).requires_grad_() for one in views]
    found = run(lstm_gates, [one.detach().requires_grad_() for one in views], rest[2:])
    expected = run(lstm_gates, dense, [one.clone(memory_format=torch.contiguous_format) for one in rest[2:]])
    assert_equal_bits(found[:5], expected[:5])
    for ours, theirs in zip(found[5:], expected[5:], strict=True):  # sums, in another order
        torch.testing.assert_close(ours, theirs, rtol=0, atol=144 * torch.finfo(torch.float32).eps * 10)


@NEEDS_EXTENSION
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_results_have_the_layout_of_the_gates(layout: torch.memory_format) -> None:
    arguments = arguments_of((2, 3, 4, 5), torch.float32, layout=layout)
    gates, cell_prev = arguments[:2]
    assert gates is not None and cell_prev is not None
    results = run(lstm_gates, arguments, gradients_of_results(arguments))
    assert all(one.is_contiguous(memory_format=layout) for one in results[:5])


@NEEDS_EXTENSION
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("gates", "cell"), DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 1, 1, 1), (1, 700, 3, 1), (2, 30, 9, 11)])
def test_memory_is_written_before_it_is_read(
    shape: tuple[int, ...],
    gates: torch.dtype,
    cell: torch.dtype,
    layout: torch.memory_format,
    poisoned_memory: Any,
) -> None:
    arguments = arguments_of(shape, gates, cell, layout=layout)
    grads = gradients_of_results(arguments)
    expected = run(lstm_gates, arguments, grads)
    with poisoned_memory():
        found = run(lstm_gates, arguments, grads)
    assert all(one.isfinite().all() for one in expected)
    assert_equal_bits(found, expected)


@NEEDS_EXTENSION
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_past_the_results_is_written(layout: torch.memory_format) -> None:
    for shape in ((1, 3, 5, 7), (2, 1, 1, 3), (1, 700, 3, 1), (3, 30, 3, 3)):
        batch, channels, height, width = shape

        def guarded(channels: int, dtype: torch.dtype, shape: tuple[int, ...] = shape) -> tuple[Tensor, Tensor]:
            """A (B, channels, H, W) tensor, and the memory that it is the middle of."""
            batch, _, height, width = shape
            size = batch * channels * height * width
            memory = torch.full((size + 128,), 7.0, dtype=dtype)
            middle = memory[64 : 64 + size]
            if layout == torch.channels_last:
                return middle.view(batch, height, width, channels).permute(0, 3, 1, 2), memory
            return middle.view(batch, channels, height, width), memory

        for gates_dtype, cell_dtype in DTYPES:
            values = arguments_of(shape, gates_dtype, cell_dtype, ("addend",), layout)
            gates, cell_prev, addend = (one.detach() for one in values[:3] if one is not None)
            addend = addend.to(cell_dtype)  # fp32 beside half gates, too
            (hidden, memory_1), (cell, memory_2) = guarded(channels, gates_dtype), guarded(channels, cell_dtype)
            torch.ops.fastris.lstm_gates_out(gates, cell_prev, addend, None, None, hidden, cell)
            compute = torch.float64 if gates_dtype == torch.float64 else torch.float32
            d_gates, memory_3 = guarded(4 * channels, gates_dtype)
            d_cell, memory_4 = guarded(channels, cell_dtype)
            d_sum, memory_5 = guarded(4 * channels, compute)
            before = d_sum.clone()
            torch.ops.fastris.lstm_gates_backward_out(
                gates, cell_prev, addend, None, None, hidden, cell, d_gates, d_cell, d_sum
            )
            for memory in (memory_1, memory_2, memory_3, memory_4, memory_5):
                assert memory[:64].eq(7).all() and memory[-64:].eq(7).all()
            added = (d_sum - before).double()  # of a sum that is at least 7 and at most twice that in all that follows
            assert (added - d_gates.double()).abs().max() <= torch.finfo(gates_dtype).eps * d_gates.abs().max() + (
                torch.finfo(compute).eps * d_sum.abs().max()
            )


@NEEDS_EXTENSION
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("wide_addend", [False, True])
@pytest.mark.parametrize(("gates_dtype", "cell_dtype"), DTYPES)
def test_a_missing_cell_is_zeros_and_memory_may_be_used_again(
    gates_dtype: torch.dtype, cell_dtype: torch.dtype, wide_addend: bool, layout: torch.memory_format
) -> None:
    shape = (2, 19, 5, 7)
    values = arguments_of(shape, gates_dtype, cell_dtype, ("addend",), layout)
    gates, cell_prev, addend = (one.detach() for one in values[:3] if one is not None)
    if wide_addend:
        addend = addend.to(torch.promote_types(gates_dtype, torch.float32))
    zeros = torch.zeros_like(cell_prev)
    results = []
    for previous in (None, zeros):
        hidden, cell = torch.empty_like(zeros, dtype=gates_dtype), torch.empty_like(zeros)
        torch.ops.fastris.lstm_gates_out(gates, previous, addend, None, None, hidden, cell)
        results.append((hidden, cell))
    assert_equal_bits(*results)
    d_hidden, d_cell = torch.randn_like(zeros, dtype=gates_dtype), torch.randn_like(zeros)
    results = []
    for previous in (None, zeros):
        d_gates, d_cell_prev = torch.empty_like(gates), torch.empty_like(d_cell)
        torch.ops.fastris.lstm_gates_backward_out(
            gates, previous, addend, None, None, d_hidden, d_cell, d_gates, d_cell_prev, None
        )
        results.append((d_gates, d_cell_prev))
    in_place = gates.clone(), d_cell.clone()
    torch.ops.fastris.lstm_gates_backward_out(
        in_place[0], None, addend, None, None, d_hidden, in_place[1], *in_place, None
    )
    assert_equal_bits(*results)
    assert_equal_bits(in_place, results[0])


def test_shapes_past_two_to_the_31(each_backend: str) -> None:
    """On the meta device, which allocates nothing."""
    batch, channels, height, width = 4, 64, 2**12, 2**12
    gates = torch.empty(batch, 4 * channels, height, width, device="meta")
    cell_prev = torch.empty(batch, channels, height, width, device="meta")
    assert gates.numel() > 2**31
    for function in (torch.ops.fastris.lstm_gates, reference.lstm_gates):
        hidden, cell = function(gates, cell_prev, None, None, None)
        assert hidden.shape == cell.shape == cell_prev.shape
    found = torch.ops.fastris.lstm_gates_backward(gates, cell_prev, None, None, None, cell_prev, None)
    assert [one.shape for one in found[:2]] == [gates.shape, cell_prev.shape]


# Threads


@NEEDS_EXTENSION
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_result_does_not_depend_on_the_number_of_threads(layout: torch.memory_format, by_threads: Any) -> None:
    arguments = arguments_of((2, 30, 40, 41), torch.float32, layout=layout)
    grads = gradients_of_results(arguments)
    results = by_threads(lambda: run(lstm_gates, arguments, grads), 1, 2, 3)
    for found in results[1:]:
        assert_equal_bits(found[:5], results[0][:5])  # torch's own sums over pixels may depend on it


@NEEDS_EXTENSION
def test_threads_do_not_disturb_each_other() -> None:
    work = [arguments_of((2, 9, 30, 31), torch.float32) for _ in range(4)]
    grads = [gradients_of_results(one) for one in work]
    expected = [run(lstm_gates, *pair) for pair in zip(work, grads, strict=True)]
    found: list[list[tuple[Tensor, ...]]] = [[] for _ in work]
    start = threading.Barrier(len(work))

    def repeat(number: int) -> None:
        start.wait()
        for _ in range(5):
            found[number].append(run(lstm_gates, work[number], grads[number]))

    threads = [threading.Thread(target=repeat, args=(number,)) for number in range(len(work))]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    for results, right in zip(found, expected, strict=True):
        assert len(results) == 5
        for result in results:
            assert_equal_bits(result[:5], right[:5])


# Autograd


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("given", OPTIONAL)
def test_gradients_in_fp64(given: tuple[str, ...], layout: torch.memory_format, each_backend: str) -> None:
    arguments = arguments_of((2, 2, 2, 3), torch.float64, given=given, layout=layout)
    leaves = [one for one in arguments if one is not None]

    def function(*tensors: Tensor) -> Any:
        rest = iter(tensors)
        return lstm_gates(*(None if one is None else next(rest) for one in arguments))

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradcheck(lambda *tensors: function(*tensors)[0], leaves)
    assert torch.autograd.gradcheck(lambda *tensors: function(*tensors)[1], leaves)


@NEEDS_EXTENSION
def test_only_the_gradients_asked_for() -> None:
    for number in range(5):
        arguments = [one if one is None else one.detach() for one in arguments_of((2, 3, 4, 5), torch.float32)]
        leaf = arguments[number]
        assert leaf is not None
        leaf.requires_grad_()
        hidden, cell = lstm_gates(*arguments)
        expected = torch.autograd.grad(sum(one.sum() for one in reference.lstm_gates(*arguments)), leaf)[0]
        (hidden.sum() + cell.sum()).backward()
        assert leaf.grad is not None
        scale = 60 * torch.finfo(torch.float32).eps * 10  # a sum of 40 values, none above 10
        torch.testing.assert_close(leaf.grad, expected, rtol=0, atol=scale)
        assert all(one.grad is None for one in arguments if one is not None and one is not leaf)


@NEEDS_EXTENSION
def test_a_graph_that_is_kept_gives_the_same_gradients_twice() -> None:
    arguments = arguments_of((2, 3, 4, 5), torch.float32)
    grads = gradients_of_results(arguments)
    results = lstm_gates(*arguments)
    first = torch.autograd.grad(results, arguments, grads, retain_graph=True)
    second = torch.autograd.grad(results, arguments, grads)
    assert_equal_bits(second, first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(results, arguments, grads)


def test_second_derivatives_are_refused_or_right() -> None:
    arguments = arguments_of((1, 2, 2, 2), torch.float64)

    def both() -> tuple[Tensor, ...]:
        first = torch.autograd.grad(
            lstm_gates(*arguments), arguments, gradients_of_results(arguments), create_graph=True
        )
        return torch.autograd.grad(sum(one.square().sum() for one in first), arguments)

    with fastris.use_backend("reference"):
        assert all(one.isfinite().all() and one.ne(0).any() for one in both())
    if backend.native_error() is None:
        with pytest.raises(RuntimeError, match="lstm_gates: the native operator has no second derivatives"):
            both()


def test_the_reference_backend_runs_no_native_kernel() -> None:
    arguments = arguments_of((1, 2, 3, 3), torch.float32)
    with fastris.use_backend("reference"), torch.profiler.profile(acc_events=True) as profile:
        run(lstm_gates, arguments, gradients_of_results(arguments))
    assert not any("fastris" in event.key for event in profile.key_averages())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype: torch.dtype, each_backend: str) -> None:
    arguments = arguments_of((2, 3, 4, 5), torch.float32)
    grads = gradients_of_results(arguments)
    expected = run(lstm_gates, arguments, grads)
    with torch.autocast("cpu", dtype=dtype):
        found = run(lstm_gates, arguments, grads)
    assert_equal_bits(found, expected)


# Operators


@NEEDS_EXTENSION
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("gates", "cell"), [DTYPES[0], DTYPES[1], DTYPES[3]])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(gates: torch.dtype, cell: torch.dtype, layout: torch.memory_format, device: str) -> None:
    ops = torch.ops.fastris
    for given in ((), ALL):
        arguments = arguments_of((2, 3, 3, 4), gates, cell, given, layout, device=device)
        torch.library.opcheck(ops.lstm_gates.default, tuple(arguments))
        values = [None if one is None else one.detach() for one in arguments]
        for grads in (gradients_of_results(values), (None, torch.randn_like(values[1]))):  # type: ignore[arg-type]
            torch.library.opcheck(ops.lstm_gates_backward.default, (*values, *grads))
    wide = torch.float64 if gates == torch.float64 else torch.float32
    layout = torch.channels_last if device == "cuda" else layout
    given_values = arguments_of((2, 3, 3, 4), gates, cell, ALL, layout, wide, device)
    values = [None if one is None else one.detach() for one in given_values]
    hidden, cell_now = gradients_of_results(values)
    torch.library.opcheck(ops.lstm_gates_out.default, (*values, hidden.clone(), cell_now.clone()))
    assert values[0] is not None
    written = torch.zeros_like(values[0]), torch.zeros_like(cell_now), torch.zeros_like(values[0], dtype=wide)
    torch.library.opcheck(ops.lstm_gates_backward_out.default, (*values, hidden, cell_now, *written))


def test_compiles_to_one_graph_on_each_backend(each_backend: str) -> None:
    def loss(*arguments: Tensor | None) -> Tensor:
        hidden, cell = lstm_gates(*arguments)  # type: ignore[arg-type]
        return (hidden.square() + cell).sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for shape, given, layout in (((2, 3, 4, 5), ALL, LAYOUTS[0]), ((3, 2, 6, 7), (), LAYOUTS[1])):
        arguments = arguments_of(shape, torch.float64, given=given, layout=layout)
        leaves = [one for one in arguments if one is not None]
        found, expected = (f(*arguments) for f in (compiled, loss))
        torch.testing.assert_close(found, expected, rtol=FP64_ROUNDINGS, atol=0)
        pairs = zip(*(torch.autograd.grad(value, leaves) for value in (found, expected)), strict=True)
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=FP64_ROUNDINGS * float(theirs.abs().max()))


# Wrong arguments


def good() -> dict[str, Any]:
    shapes = {"gates": (1, 8, 3, 2), "cell_prev": (1, 2, 3, 2), "addend": (1, 8, 3, 2), "bias": (8,), "peephole": (6,)}
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("gates", torch.zeros(8, 3, 2), ValueError, r"floating \(B, 4C, H, W\), got float32 \(8,3,2\)"),
        ("gates", torch.zeros(1, 7, 3, 2), ValueError, r"\(B, 4C, H, W\)"),
        ("gates", torch.zeros(1, 8, 3, 2).int(), ValueError, "got int32"),
        ("gates", [0.0], TypeError, "a tensor, .*got list"),
        ("cell_prev", None, TypeError, "a tensor, .*got NoneType"),
        ("cell_prev", torch.zeros(1, 2, 2, 3), ValueError, r"\(1, 2, 3, 2\), got float32 \(1,2,2,3\)"),
        ("cell_prev", torch.zeros(1, 8, 3, 2), ValueError, r"\(1, 2, 3, 2\)"),
        ("cell_prev", torch.zeros(1, 2, 3, 2).long(), ValueError, "got int64"),
        ("cell_prev", torch.zeros(1, 2, 3, 2, device="meta"), ValueError, "on cpu like gates, got meta"),
        ("addend", torch.zeros(1, 1, 3, 2), ValueError, r"\(1, 8, 3, 2\)"),
        ("addend", 0.0, TypeError, "got float"),
        ("bias", torch.zeros(1, 8, 1, 1), ValueError, r"\(8,\)"),
        ("bias", torch.zeros(8, device="meta"), ValueError, "on cpu"),
        ("peephole", torch.zeros(8), ValueError, r"\(6,\), got float32 \(8"),
        ("peephole", torch.zeros(6).bool(), ValueError, "got bool"),
    ],
)
def test_wrong_arguments_are_named(
    name: str, value: object, error: type[Exception], message: str, each_backend: str
) -> None:
    lstm_gates(**good())
    with pytest.raises(error, match=f"lstm_gates: {name} must be .*{message}"):
        lstm_gates(**{**good(), name: value})


FORWARD = ["gates", "cell_prev", "addend", "bias", "peephole", "hidden", "cell"]
BACKWARD = ["gates", "cell_prev", "addend", "bias", "peephole", "d_hidden", "d_cell", "d_gates", "d_cell_prev", "d_sum"]


def kernel_arguments(names: Sequence[str], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    rows = {"gates": 8, "addend": 8, "d_gates": 8, "d_sum": 8}
    wide = {"bias": 8, "peephole": 6}
    return {
        name: torch.zeros(wide[name]) if name in wide else torch.zeros(2, rows.get(name, 2), 3, 4).to(dtype)
        for name in names
    }


def wrong_values(name: str, value: Tensor) -> Iterator[Tensor]:
    yield value.int()
    yield value.double()
    yield value[:0]
    yield value.flatten()[:1]
    if value.dim() == 1:
        yield torch.zeros(2 * len(value))[::2]
        yield value.expand(1, -1)
        return
    yield value[0]
    yield value.unsqueeze(0)
    yield value.mT.contiguous()
    yield value[:, :1]
    yield torch.zeros(4, *value.shape[1:])[::2]
    yield value[:1].expand(value.shape)
    yield value.mT.contiguous().mT
    if name != "gates":
        yield value.contiguous(memory_format=torch.channels_last)


@NEEDS_EXTENSION
@pytest.mark.parametrize(
    ("operator", "names", "name"),
    [("lstm_gates_out", FORWARD, name) for name in FORWARD]
    + [("lstm_gates_backward_out", BACKWARD, name) for name in BACKWARD],
)
def test_the_kernel_itself_refuses_what_would_be_unsafe(operator: str, names: list[str], name: str) -> None:
    function = getattr(torch.ops.fastris, operator)
    arguments = kernel_arguments(names)
    function(*arguments.values())
    for value in wrong_values(name, arguments[name]):
        with pytest.raises(RuntimeError, match="lstm_gates"):
            function(*{**arguments, name: value}.values())


@NEEDS_EXTENSION
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.zeros(2, 2, 3, 4).half()}, "hidden has the wrong dtype"),
        ({"cell_prev": torch.zeros(2, 3, 3, 4)}, "cell_prev must have 2 channels"),
        ({"addend": torch.zeros(2, 8, 4, 3)}, "addend must have 8 channels"),
        ({"addend": torch.zeros(2, 8, 3, 4).half()}, "addend must be in the dtype of the gates, or float32"),
        ({"bias": torch.zeros(7)}, r"bias must be contiguous \(8\)"),
        ({"peephole": torch.zeros(6).bfloat16()}, r"peephole must be contiguous \(6\), in the dtype computed with"),
        ({"cell": torch.zeros(2, 3, 4, 2).permute(0, 3, 1, 2)}, "cell must be dense in the layout of the gates"),
        ({"gates": torch.zeros(2, 8, 4, 3).mT}, "gates must be dense"),
        ({"gates": torch.zeros(2, 6, 3, 4)}, r"gates must be \(B,4C,H,W\)"),
        (
            {"cell_prev": torch.zeros(2, 2, 3, 4).half(), "cell": torch.zeros(2, 2, 3, 4).half()},
            "the cell must be in the dtype of the gates, or float32",
        ),
    ],
)
def test_the_kernel_says_what_is_wrong(changes: dict[str, Tensor], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastris.lstm_gates_out(*{**kernel_arguments(FORWARD), **changes}.values())


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("gates", "cell"), DTYPES[1:])
def test_cuda_is_no_worse_than_eager_and_gives_the_same_bits_every_time(
    shape: tuple[int, ...], gates: torch.dtype, cell: torch.dtype, layout: torch.memory_format, no_worse_than_eager: Any
) -> None:
    arguments = arguments_of(shape, gates, cell, layout=layout, device="cuda")
    grads = gradients_of_results(arguments)
    found, eager, exact = three_ways(arguments, grads)
    no_worse_than_eager(found, eager, exact)
    assert_equal_bits(run(lstm_gates, arguments, grads), found)
