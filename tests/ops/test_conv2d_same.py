"""conv2d_same: Winograd's filtering and torch's convolutions against torch's own in fp64."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import fastris
from fastris import backend, reference
from fastris.ops.conv2d_same import (
    WINOGRAD_DTYPES,
    RepeatedWeight,
    SameConvolution,
    conv2d_same,
    empty_channels_last,
)

pytestmark = pytest.mark.skipif(backend.native_error() is not None, reason="fastris._C is not built")

SHAPES = [  # B, in, out, H, W
    (5, 30, 120, 13, 17),  # odd sides, channels that are no whole vectors
    (15, 9, 200, 8, 9),
    (1, 64, 48, 40, 33),  # more tiles than the strips of any part
    (3, 25, 34, 23, 18),  # the fewest channels for tiles of 4×4
    (2, 128, 33, 32, 32),  # sums made of several
    (1, 30, 16, 32, 33),  # fewer strips of tiles than parts of the weight's gradient
    (1, 8, 16, 1, 50),  # too small for Winograd
]


def gradients(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, native: bool) -> tuple[Tensor, ...]:
    with fastris.use_backend("auto" if native else "reference"):
        y = conv2d_same(x, weight, bias)
    return (y, *torch.autograd.grad(y, (x, weight, bias), grad.to(y.dtype)))


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.detach().double() - exact.detach()).norm() / exact.detach().norm())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_error_is_at_most_twice_that_of_torch_in_channels_last(
    shape: tuple[int, ...], layout: torch.memory_format
) -> None:
    batch, inputs, out, height, width = shape
    x = torch.randn(batch, inputs, height, width).contiguous(memory_format=layout).requires_grad_()
    weight = torch.randn(out, inputs, 3, 3, requires_grad=True)
    bias, grad = torch.randn(out, requires_grad=True), torch.randn(batch, out, height, width)
    found = gradients(x, weight, bias, grad, native=True)
    eager = gradients(x.contiguous(memory_format=torch.channels_last), weight, bias, grad, native=False)
    wide = [one.detach().double().requires_grad_() for one in (x, weight, bias)]
    exact = gradients(wide[0], wide[1], wide[2], grad, native=False)
    resolution = torch.finfo(torch.float32).eps  # sums of a few terms may be exact in one order and not in another
    for ours, theirs, truth in zip(found, eager, exact, strict=True):
        assert error(ours, truth) <= 2 * max(error(theirs, truth), resolution)
    assert found[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.skipif(torch.bfloat16 not in WINOGRAD_DTYPES, reason="torch's own convolution in bf16 is quicker here")
@pytest.mark.parametrize("shape", SHAPES[:-1])
def test_bf16_is_rounded_once(shape: tuple[int, ...], poisoned_memory: Any) -> None:
    batch, inputs, out, height, width = shape
    x = torch.randn(batch, inputs, height, width).bfloat16().requires_grad_()
    weight, bias = (torch.randn(size).bfloat16().requires_grad_() for size in ((out, inputs, 3, 3), (out,)))
    grad = torch.randn(batch, out, height, width).bfloat16()
    wide = [one.detach().double().requires_grad_() for one in (x, weight, bias)]
    exact = gradients(wide[0], wide[1], wide[2], grad, native=False)
    with poisoned_memory():
        found = gradients(x, weight, bias, grad, native=True)
    for ours, truth in zip(found[:3], exact[:3], strict=True):
        assert ours.dtype == torch.bfloat16
        assert error(ours, truth) <= 1.01 * error(truth.bfloat16(), truth)


@pytest.mark.skipif(torch.bfloat16 not in WINOGRAD_DTYPES, reason="torch's own convolution in bf16 is quicker here")
def test_bf16_of_ties_infinity_and_nan() -> None:
    x = torch.zeros(1, 8, 32, 32, dtype=torch.bfloat16)
    x[0, :2, 4, 4] = torch.tensor([1.0, 2.0**-8])
    x[0, :2, 12, 12] = torch.tensor([1 + 2.0**-7, 2.0**-8])
    x[0, :2, 20, 20] = torch.tensor([3e38, 3e38])
    x[0, 0, 28, 28] = float("nan")
    weight = torch.zeros(8, 8, 3, 3, dtype=torch.bfloat16)
    weight[:, :, 1, 1] = 1
    y = SameConvolution(weight).forward(x)[0, 0]
    assert y[4, 4] == 1 and y[12, 12] == 1 + 2.0**-6 and y[20, 20] == float("inf") and y[28, 28].isnan()


@pytest.mark.parametrize("kernel", [(3, 3), (1, 1), (2, 2), (5, 4)])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_kernel_equals_the_reference(kernel: tuple[int, int], dilation: int, dtype: torch.dtype) -> None:
    x = torch.randn(15, 8, 9, 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(12, 8, *kernel, dtype=dtype, requires_grad=True)
    y = torch.ops.fastris.conv2d_same(x, weight, None, dilation)
    expected = reference.conv2d_same(x, weight, None, dilation)
    grad = torch.randn_like(expected)
    found = (y, *torch.autograd.grad(y, (x, weight), grad))
    truth = (expected, *torch.autograd.grad(expected, (x, weight), grad))
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-10}
    for ours, theirs in zip(found, truth, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize("shape", [(4, 2, 32, 48, 17, 16), (2, 3, 5, 9, 4, 3)])  # by Winograd, and by torch
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_channels_before_those_of_x_take_part_without_a_gradient(
    shape: tuple[int, ...], layout: torch.memory_format
) -> None:
    batch, more, inputs, out, height, width = shape
    before, x = (torch.randn(batch, c, height, width).contiguous(memory_format=layout) for c in (more, inputs))
    weight = torch.randn(out, more + inputs, 3, 3, requires_grad=True)
    before.requires_grad_(), x.requires_grad_()
    grad = torch.randn(batch, out, height, width)

    def gradients(y: Tensor) -> tuple[Tensor, ...]:
        return (y, *torch.autograd.grad(y, (x, weight), grad))

    whole = SameConvolution(weight.detach()).by_winograd(torch.cat([before, x], 1))
    assert whole == (inputs == 32)
    expected = gradients(torch.ops.fastris.conv2d_same(torch.cat([before, x], 1), weight, None, 1))
    for backend_name in ("native", "reference"):
        with fastris.use_backend(backend_name):
            y = conv2d_same(x, weight, before=before)
        assert torch.autograd.grad(y.sum(), before, allow_unused=True, retain_graph=True) == (None,)
        for ours, theirs in zip(gradients(y), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    y = conv2d_same(x, weight, before=before)
    assert gradients(y)[1].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("more", [0, 2])
def test_a_repeated_weight_is_transformed_once_and_changes_no_bit(more: int) -> None:
    x, before = torch.randn(4, 32, 17, 16, requires_grad=True), torch.randn(4, more, 17, 16) if more else None
    whole = torch.randn(48, 9 + more + 32, 3, 3, requires_grad=True)

    def gradients(weight: Tensor | RepeatedWeight) -> tuple[Tensor, ...]:
        y = x
        for _ in range(3):
            y = conv2d_same(y, weight, before=before)[:, :32].tanh()
        return (y, *torch.autograd.grad(y.sum(), (x, whole)))

    expected = gradients(whole[:, 9:])
    with torch.profiler.profile() as profile:
        found = gradients(RepeatedWeight(whole[:, 9:]))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert [one.name for one in profile.events()].count("fastris::winograd_weight") == 2  # for results, and gradients
    repeated = RepeatedWeight(whole[:, 9:])
    with torch.no_grad():
        assert torch.equal(conv2d_same(x, repeated, before=before), conv2d_same(x, whole[:, 9:], before=before))
    with fastris.use_backend("reference"):
        y = conv2d_same(x, repeated, before=before)
        assert torch.equal(y, conv2d_same(x, whole[:, 9:], before=before))
    functional = torch.func.grad(lambda x: conv2d_same(x, RepeatedWeight(whole[:, 9:]), before=before).sum())
    (truth,) = torch.autograd.grad(conv2d_same(x, whole[:, 9:], before=before).sum(), x)
    assert torch.equal(functional(x.detach()), truth)


def test_which_convolutions_go_by_winograd() -> None:
    x, weight = torch.zeros(16, 8, 8, 8), torch.zeros(16, 8, 3, 3)
    assert SameConvolution(weight).by_winograd(x)
    assert not SameConvolution(weight).by_winograd(x[..., :7].repeat(2, 1, 1, 1))
    assert not SameConvolution(weight).by_winograd(x[:15])
    assert not SameConvolution(weight, 2).by_winograd(x)
    assert SameConvolution(weight.bfloat16()).by_winograd(x) == (torch.bfloat16 in WINOGRAD_DTYPES)
    assert not SameConvolution(weight.half()).by_winograd(x)
    assert not SameConvolution(torch.zeros(16, 8, 5, 5)).by_winograd(x)
    assert not SameConvolution(torch.zeros(16, 2, 3, 3)).by_winograd(x)


def test_tiles_are_large_where_that_keeps_the_digits() -> None:
    weight = torch.zeros(16, 32, 3, 3)
    assert [SameConvolution(weight).side(summed) for summed in (24, 25)] == [2, 4]
    assert SameConvolution(weight, largest=2).side(25) == 2


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("side", [2, 4])
def test_tiles_of_either_side_are_exact_but_for_rounding(side: int, turned: bool) -> None:
    x = torch.randn(2, 11, 13, 10).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(11, 40, 3, 3) if turned else torch.randn(40, 11, 3, 3)
    y = empty_channels_last(x, 40)
    bias = torch.randn(40)
    torch.ops.fastris.winograd_convolve_out(x, torch.ops.fastris.winograd_weight(weight, turned, side), bias, y)
    as_convolved = weight.transpose(0, 1).flip(2, 3) if turned else weight
    expected = torch.nn.functional.conv2d(x.double(), as_convolved.double(), bias.double(), padding=1)
    assert error(y, expected) < 2e-6
    grad = torch.randn(2, 40, 13, 10).contiguous(memory_format=torch.channels_last)
    found = torch.ops.fastris.winograd_weight_gradient(x, grad, side)
    assert error(found, torch.nn.grad.conv2d_weight(x.double(), (40, 11, 3, 3), grad.double(), padding=1)) < 2e-6


@pytest.mark.parametrize("side", [2, 4])
@pytest.mark.parametrize("out", [24, 130])  # fewer panels than threads may take, and several of one part
def test_nothing_is_left_unwritten_and_the_bits_do_not_depend_on_the_threads(
    out: int, side: int, by_threads: Any
) -> None:
    x = torch.randn(2, 16, 31, 29).contiguous(memory_format=torch.channels_last)
    grad = torch.randn(2, out, 31, 29).contiguous(memory_format=torch.channels_last)
    convolution = SameConvolution(torch.randn(out, 16, 3, 3))

    def run() -> tuple[Tensor, ...]:
        y, d_x = (empty_channels_last(x, channels).fill_(float("nan")) for channels in (out, 16))
        torch.ops.fastris.winograd_convolve_out(x, convolution.transformed(False, side), None, y)
        torch.ops.fastris.winograd_convolve_out(grad, convolution.transformed(True, side), None, d_x)
        return y, d_x, torch.ops.fastris.winograd_weight_gradient(x, grad, side)

    results = by_threads(run)
    for one, other in zip(*results, strict=True):
        assert not one.isnan().any()
        assert torch.equal(one, other)


def test_a_bias_of_any_strides_or_of_another_dtype() -> None:
    x, weight = torch.randn(16, 8, 8, 8), torch.randn(32, 8, 3, 3)
    for bias in (torch.randn(32, 2)[:, 0], torch.randn(1).expand(32)):
        expected = torch.nn.functional.conv2d(x, weight, bias, padding=1)
        torch.testing.assert_close(conv2d_same(x, weight, bias), expected, rtol=1e-4, atol=1e-4)
    for shape in ((16, 8, 8, 8), (1, 8, 4, 4)):  # by Winograd, and by torch
        with pytest.raises(RuntimeError, match="type"):
            conv2d_same(torch.randn(shape), weight, torch.randn(32).double())


def test_results_may_be_changed_in_place() -> None:
    x, weight = torch.randn(2, 8, 32, 32, requires_grad=True), torch.randn(8, 8, 3, 3)
    with torch.no_grad():
        expected = torch.autograd.functional.vjp(lambda one: conv2d_same(one, weight).relu(), x, torch.ones_like(x))
    y = conv2d_same(x, weight).relu_()
    y.sum().backward()
    assert torch.equal(y, expected[0]) and torch.equal(x.grad, expected[1])


def test_no_channels_come_out() -> None:
    layout = torch.channels_last
    x, grad = (torch.zeros(2, c, 8, 8).contiguous(memory_format=layout) for c in (8, 0))
    assert torch.ops.fastris.winograd_weight_gradient(x, grad, 2).shape == (0, 8, 3, 3)


def test_no_images() -> None:
    weight = torch.randn(16, 8, 3, 3, requires_grad=True)
    for shape in ((0, 8, 9, 9), (0, 8, 4, 4)):
        x = torch.randn(shape, requires_grad=True)
        y = conv2d_same(x, weight)
        assert tuple(y.shape) == (shape[0], 16, *shape[2:])
        d_x, d_weight = torch.autograd.grad(y.sum(), (x, weight))
        assert d_x.shape == x.shape
        assert not d_weight.any()


def test_a_nan_stays_in_the_tiles_that_see_it() -> None:
    x = torch.randn(1, 8, 32, 32)
    x[0, 3, 6, 6] = float("nan")
    y = conv2d_same(x, torch.randn(8, 8, 3, 3))
    assert y[..., 5:8, 5:8].isnan().all()
    assert not y[..., :4, :].isnan().any()
    assert not y[..., 9:].isnan().any()


def test_opcheck_and_one_graph() -> None:
    x, weight = torch.randn(15, 8, 8, 9, requires_grad=True), torch.randn(12, 8, 3, 3, requires_grad=True)
    bias = torch.randn(12, requires_grad=True)
    torch.library.opcheck(torch.ops.fastris.conv2d_same.default, (x, weight, bias, 1))
    part = x.detach()[:, 3:].requires_grad_()
    torch.library.opcheck(torch.ops.fastris.conv2d_same.default, (part, weight, bias, 1, x.detach()))
    transformed = RepeatedWeight(weight).transformed(x, 3, True)
    assert None not in transformed
    torch.library.opcheck(torch.ops.fastris.conv2d_same.default, (part, weight, bias, 1, x.detach(), *transformed))
    arguments = (torch.randn(15, 12, 8, 9), x.detach(), weight.detach(), 1, True, True, 3)
    for more in ((), transformed[1:]):
        torch.library.opcheck(torch.ops.fastris.conv2d_same_backward.default, (*arguments, *more))
    repeated = torch.compile(lambda x, w: conv2d_same(x, RepeatedWeight(w)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(repeated(x, weight), conv2d_same(x, weight))
    compiled = torch.compile(lambda *inputs: conv2d_same(*inputs).relu(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, bias), conv2d_same(x, weight, bias).relu())


def test_second_derivatives_are_refused() -> None:
    x, weight = torch.randn(1, 8, 8, 8, requires_grad=True), torch.randn(8, 8, 3, 3)
    (first,) = torch.autograd.grad(conv2d_same(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="conv2d_same: .* no second derivatives"):
        first.sum().backward()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda x, w, y: (x.contiguous(), w, None, y), "x must be channels_last"),
        (lambda x, w, y: (x.double(), w, None, y), "x must be float32 or bfloat16"),
        (lambda x, w, y: (x, w, None, y.bfloat16()), "y must be as large as x and of its dtype"),
        (lambda x, w, y: (x, w[..., :4], None, y), "weight must come from winograd_weight"),
        (lambda x, w, y: (x, w, None, y[:1]), "y must be as large as x"),
        (lambda x, w, y: (x, w, torch.zeros(3), y), "bias must be contiguous float32"),
    ],
)
def test_the_kernel_checks_what_it_is_given(arguments: object, message: str) -> None:
    layout = torch.channels_last
    x, y = (torch.zeros(2, c, 4, 5).contiguous(memory_format=layout) for c in (8, 16))
    weight = torch.ops.fastris.winograd_weight(torch.zeros(16, 8, 3, 3), False, 2)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastris.winograd_convolve_out(*arguments(x, weight, y))  # type: ignore[operator]


CODE = """
import torch
from fastris.ops.conv2d_same import SameConvolution
torch.manual_seed(0)
convolution = SameConvolution(torch.randn(52, 30, 3, 3))
x, grad = torch.randn(10, 30, 11, 10), torch.randn(10, 52, 11, 10)
exact = SameConvolution(convolution.weight.double())
for found, truth in zip(
    (convolution.forward(x), *convolution.backward(grad, x, True, True)),
    (exact.forward(x.double()), *exact.backward(grad.double(), x.double(), True, True)),
):
    torch.testing.assert_close(found, truth.float(), rtol=1e-4, atol=1e-4)
"""


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_instruction_set(capability: str) -> None:
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    result = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
