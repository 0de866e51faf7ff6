"""group_norm_relu: the two passes of the CPU against the reference, and the reference against its definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastris
from fastris import backend, reference
from fastris.ops.group_norm_relu import group_norm_relu

native = pytest.mark.skipif(backend.native_error() is not None, reason="fastris._C is not built")

SHAPES = [  # B, C, H, W, groups
    (2, 32, 16, 18, 8),
    (3, 30, 7, 5, 5),  # channels that are no whole vectors
    (1, 3, 1, 2, 3),  # fewer channels than a vector, a group for each
    (2, 12, 23, 17, 1),  # several chunks of pixels, the last not whole
]
Arguments = tuple[Tensor, Tensor, Tensor]


def arguments(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, mean: float = 0.5) -> Arguments:
    batch, channels, height, width, _ = shape
    x = torch.randn(batch, height, width, channels, dtype=dtype).permute(0, 3, 1, 2) + mean
    weight, bias = torch.randn(channels, dtype=dtype), torch.randn(channels, dtype=dtype)
    return tuple(one.requires_grad_() for one in (x, weight, bias))  # type: ignore[return-value]


def cast(given: Arguments, dtype: torch.dtype) -> Arguments:
    return tuple(one.detach().to(dtype).requires_grad_() for one in given)  # type: ignore[return-value]


def results(given: Arguments, groups: int, call: Callable[..., Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    y = call(*given, groups)
    return (y, *torch.autograd.grad(y, given, grad.to(y.dtype)))


def test_the_reference_is_its_definition() -> None:
    x, weight, bias = arguments((2, 6, 4, 3, 2), torch.float64)
    groups = x.reshape(2, 2, -1)
    normal = (groups - groups.mean(2, keepdim=True)) / (groups.var(2, unbiased=False, keepdim=True) + 1e-3).sqrt()
    expected = normal.reshape(x.shape) * weight.view(-1, 1, 1) + bias.view(-1, 1, 1)
    torch.testing.assert_close(group_norm_relu(x, weight, bias, 2, 1e-3), expected.clamp_min(0))


@native
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mean", [0.5, 100.0])
def test_error_is_at_most_twice_that_of_eager(
    shape: tuple[int, ...], mean: float, no_worse_than_eager: Any, poisoned_memory: Any
) -> None:
    given, groups = arguments(shape, mean=mean), shape[4]
    grad = torch.randn(shape[:4])
    with poisoned_memory():
        found = results(given, groups, group_norm_relu, grad)
    eager = results(cast(given, torch.float32), groups, reference.group_norm_relu, grad)
    exact = results(cast(given, torch.float64), groups, reference.group_norm_relu, grad.double())
    no_worse_than_eager(found, eager, exact)


@native
@pytest.mark.parametrize("place", [(0, 0), (11, 7)])
@pytest.mark.parametrize("value", [10.0, 1e4])
def test_one_pixel_unlike_all_others(place: tuple[int, int], value: float, no_worse_than_eager: Any) -> None:
    given, grad = arguments((2, 16, 23, 17, 4), mean=0.0), torch.randn(2, 16, 23, 17)
    with torch.no_grad():
        given[0][:, :, place[0], place[1]] = value
    found = results(given, 4, group_norm_relu, grad)
    eager = results(cast(given, torch.float32), 4, reference.group_norm_relu, grad)
    exact = results(cast(given, torch.float64), 4, reference.group_norm_relu, grad.double())
    no_worse_than_eager(found, eager, exact)


@native
def test_a_group_of_equal_numbers() -> None:
    given = arguments(SHAPES[0])
    with torch.no_grad():
        given[0][0, 4:8] = 1e4 / 3
    grad = torch.randn(SHAPES[0][:4])
    y, d_x, _, _ = results(given, 8, group_norm_relu, grad)
    expected = given[2][4:8].relu().view(1, -1, 1, 1).expand(1, 4, 16, 18)
    torch.testing.assert_close(y[:1, 4:8], expected)
    assert d_x.isfinite().all()


@native
def test_any_layout_is_taken_and_results_are_channels_last() -> None:
    given, grad = arguments(SHAPES[0]), torch.randn(2, 32, 18, 16).transpose(2, 3)
    expected = results(given, 8, group_norm_relu, grad)
    x = given[0].detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    weight, bias = (torch.stack([one.detach(), one.detach()], 1)[:, 0].requires_grad_() for one in given[1:])
    found = results((x, weight, bias), 8, group_norm_relu, grad)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert all(one.is_contiguous(memory_format=torch.channels_last) for one in found[:2])


@native
def test_the_bits_do_not_depend_on_the_threads(by_threads: Any) -> None:
    given, grad = arguments((2, 32, 40, 30, 8)), torch.randn(2, 32, 40, 30)
    runs = by_threads(lambda: results(given, 8, group_norm_relu, grad))
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


@native
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_nan_or_infinity_stays_in_its_group(value: float) -> None:
    given, grad = arguments(SHAPES[0]), torch.randn(SHAPES[0][:4])
    y, d_x, _, _ = results(given, 8, group_norm_relu, grad)
    with torch.no_grad():
        given[0][0, 5, 3, 3] = value
    found, d_found, _, _ = results(given, 8, group_norm_relu, grad)
    assert found[0, 4:8].isnan().any() and d_found[0, 4:8].isnan().any()
    others = torch.ones(2, 32, dtype=torch.bool)
    others[0, 4:8] = False
    assert torch.equal(found[others], y[others]) and torch.equal(d_found[others], d_x[others])


def test_other_dtypes_autocast_and_the_reference_back_end_take_the_reference() -> None:
    given, groups = arguments(SHAPES[1]), SHAPES[1][4]
    wide = cast(given, torch.float64)
    assert torch.equal(group_norm_relu(*wide, groups), reference.group_norm_relu(*wide, groups))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(group_norm_relu(*given, groups), reference.group_norm_relu(*given, groups))
    with fastris.use_backend("reference"):
        assert torch.equal(group_norm_relu(*given, groups), reference.group_norm_relu(*given, groups))


@native
@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 8, 0, 4)])
def test_nothing(shape: tuple[int, ...]) -> None:
    given = arguments((*shape, 4))
    y, d_x, d_weight, d_bias = results(given, 4, group_norm_relu, torch.zeros(shape))
    assert y.shape == d_x.shape == shape
    assert not d_weight.any() and not d_bias.any()
    _, mean, rstd = torch.ops.fastris.group_norm_relu(*(one.detach() for one in given), 4, 0.25)
    assert not mean.any() and torch.equal(rstd, torch.full_like(rstd, 2))


@native
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_opcheck_and_one_graph(shape: tuple[int, ...]) -> None:
    given, groups = arguments(shape), shape[4]
    torch.library.opcheck(torch.ops.fastris.group_norm_relu.default, (*given, groups, 1e-5))
    plain = tuple(one.detach() for one in given)
    _, mean, rstd = torch.ops.fastris.group_norm_relu(*plain, groups, 1e-5)
    grad = torch.randn(shape[:4]).contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(torch.ops.fastris.group_norm_relu_backward.default, (grad, *plain, mean, rstd, groups))
    compiled = torch.compile(lambda *one: group_norm_relu(*one, groups).exp(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), group_norm_relu(*given, groups).exp())


@native
def test_second_derivatives_are_refused() -> None:
    given = arguments(SHAPES[1])
    (first,) = torch.autograd.grad(group_norm_relu(*given, 5).square().sum(), given[0], create_graph=True)
    with pytest.raises(RuntimeError, match="group_norm_relu: .* no second derivatives"):
        first.sum().backward()


@native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, b, n: (x.contiguous(), w, b, n), "x must be channels_last"),
        (lambda x, w, b, n: (x.double(), w, b, n), "x must be float32"),
        (lambda x, w, b, n: (x, w[:3], b, n), r"weight must be contiguous float32 \(C\)"),
        (lambda x, w, b, n: (x, w, b.double(), n), r"bias must be contiguous float32 \(C\)"),
        (lambda x, w, b, n: (x, w, b, 5), "groups must divide the 32 channels of x, got 5"),
        (lambda x, w, b, n: (x, w, b, 0), "groups must divide the 32 channels of x, got 0"),
    ],
)
def test_the_kernel_checks_what_it_is_given(change: Any, message: str) -> None:
    given = change(*(one.detach() for one in arguments(SHAPES[0])), 8)
    with pytest.raises(RuntimeError, match=f"group_norm_relu: {message}"):
        torch.ops.fastris.group_norm_relu(*given, 1e-5)


@native
def test_the_backward_checks_what_it_is_given() -> None:
    x, weight, bias = (one.detach() for one in arguments(SHAPES[0]))
    y, mean, rstd = torch.ops.fastris.group_norm_relu(x, weight, bias, 8, 1e-5)
    for grad in (y[:1], y.contiguous(), y.double()):
        with pytest.raises(RuntimeError, match="group_norm_relu: grad must be float32 and channels_last like x"):
            torch.ops.fastris.group_norm_relu_backward(grad, x, weight, bias, mean, rstd, 8)
    with pytest.raises(RuntimeError, match="group_norm_relu: mean and rstd must be"):
        torch.ops.fastris.group_norm_relu_backward(y, x, weight, bias, mean[:1], rstd, 8)


@native
@pytest.mark.parametrize("level", ["default", "avx2"])
def test_every_instruction_set_finds_the_same(level: str, at_simd_level: Any) -> None:
    at_simd_level(
        level,
        """
        import torch
        from fastris import reference
        from fastris.ops.group_norm_relu import group_norm_relu

        for channels in (2, 36):
            x, weight, bias = torch.randn(2, channels, 13, 11), torch.randn(channels), torch.randn(channels)
            moving = [one.requires_grad_() for one in (x, weight, bias)]
            results = []
            for call in (group_norm_relu, reference.group_norm_relu):
                y = call(*moving, 2)
                results.append((y, *torch.autograd.grad(y.square().sum(), moving)))
            for ours, theirs in zip(*results, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
        """,
    )
