"""dynamic_mask: the rows of the CPU against the reference, and the reference against its definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastris
from fastris import backend, reference
from fastris.ops.dynamic_mask import dynamic_mask

native = pytest.mark.skipif(backend.native_error() is not None, reason="fastris._C is not built")

RADIUS = 16.0
SIZES = [(3, 24, 32), (2, 9, 37), (1, 1, 5), (2, 17, 3)]  # B, H, W: rows of no whole vectors, and of fewer than one
Arguments = tuple[Tensor | None, ...]


def arguments(size: tuple[int, int, int], middle: bool, dtype: torch.dtype = torch.float32) -> Arguments:
    """Leaves: detail, filter, centre, middle."""
    batch, height, width = size
    detail = torch.randn(batch, 10 if middle else 8, height, width, dtype=dtype)
    filters = torch.randn(batch, 129 if middle else 105, dtype=dtype)
    centre = torch.rand(batch, 2, dtype=dtype) * torch.tensor([width, height], dtype=dtype)
    return tuple(
        None if one is None else one.requires_grad_()
        for one in (detail, filters, centre, torch.randn(batch, 2, dtype=dtype) if middle else None)
    )


def cast(given: Arguments, dtype: torch.dtype) -> Arguments:
    return tuple(None if one is None else one.detach().to(dtype).requires_grad_() for one in given)


def results(given: Arguments, call: Callable[..., Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    logits = call(*given, RADIUS)
    leaves = [one for one in given if one is not None]
    return (logits, *torch.autograd.grad(logits, leaves, grad.to(logits.dtype)))


BOTH = pytest.mark.parametrize("middle", [True, False])


@BOTH
def test_the_reference_does_pixel_by_pixel_what_it_says(middle: bool) -> None:
    detail, filters, centre, point = arguments((2, 4, 3), middle, torch.float64)
    logits = dynamic_mask(detail, filters, centre, point, RADIUS)
    inputs = 14 if middle else 11
    for b in range(2):
        first, bias, second, last = filters[b].split((8 * inputs, 8, 8, 1))
        for y in range(4):
            for x in range(3):
                offset = (torch.tensor([x + 0.5, y + 0.5], dtype=torch.float64) - centre[b]) / RADIUS
                shown = [detail[b, :8, y, x], offset, offset.square().sum()[None]]
                if middle:
                    lead = offset + detail[b, 8:, y, x] - point[b]
                    shown += [lead, lead.square().sum()[None]]
                inner = (first.view(8, inputs) @ torch.cat(shown) + bias).relu()
                torch.testing.assert_close(logits[b, y, x], (second @ inner + last).squeeze())


@BOTH
def test_gradients_of_the_reference(middle: bool) -> None:
    given = [one for one in arguments((2, 3, 2), middle, torch.float64) if one is not None]

    def call(detail: Tensor, filters: Tensor, centre: Tensor, point: Tensor | None = None) -> Tensor:
        return reference.dynamic_mask(detail, filters, centre, point, RADIUS)

    assert torch.autograd.gradcheck(call, given)


@native
@BOTH
@pytest.mark.parametrize("size", SIZES)
def test_error_is_at_most_twice_that_of_eager(
    size: tuple[int, int, int], middle: bool, no_worse_than_eager: Any, poisoned_memory: Any
) -> None:
    given, grad = arguments(size, middle), torch.randn(size)
    with poisoned_memory():
        found = results(given, torch.ops.fastris.dynamic_mask, grad)
    eager = results(cast(given, torch.float32), reference.dynamic_mask, grad)
    exact = results(cast(given, torch.float64), reference.dynamic_mask, grad.double())
    no_worse_than_eager(found, eager, exact)


@native
def test_views_are_taken() -> None:
    given, grad = arguments((2, 9, 12), True), torch.randn(2, 12, 9).transpose(1, 2)
    expected = results(given, dynamic_mask, grad.contiguous())
    views = (
        given[0].detach().contiguous(memory_format=torch.channels_last).requires_grad_(),
        given[1].detach().t().contiguous().t().requires_grad_(),
        *given[2:],
    )
    for ours, theirs in zip(results(views, dynamic_mask, grad), expected, strict=True):
        assert torch.equal(ours, theirs)


@native
def test_the_bits_do_not_depend_on_the_threads(by_threads: Any) -> None:
    given, grad = arguments((3, 50, 40), True), torch.randn(3, 50, 40)
    runs = by_threads(lambda: results(given, torch.ops.fastris.dynamic_mask, grad))
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


@native
def test_a_nan_stays_in_its_pixel() -> None:
    given = arguments(SIZES[0], True)
    with torch.no_grad():
        given[0][1, 3, 5, 6] = float("nan")
    logits = torch.ops.fastris.dynamic_mask(*given, RADIUS)
    assert logits[1, 5, 6].isnan() and logits.isnan().sum() == 1


def test_other_dtypes_autocast_and_the_reference_back_end_take_the_reference() -> None:
    given = arguments(SIZES[0], True)
    wide = cast(given, torch.float64)
    assert torch.equal(dynamic_mask(*wide, RADIUS), reference.dynamic_mask(*wide, RADIUS))
    with torch.autocast("cpu", torch.bfloat16):
        assert dynamic_mask(*given, RADIUS).dtype == torch.bfloat16
    with fastris.use_backend("reference"):
        assert torch.equal(dynamic_mask(*given, RADIUS), reference.dynamic_mask(*given, RADIUS))


@native
@BOTH
def test_no_images(middle: bool) -> None:
    logits, *gradients = results(arguments((0, 4, 4), middle), dynamic_mask, torch.zeros(0, 4, 4))
    assert logits.shape == (0, 4, 4) and all(one.numel() == 0 for one in gradients)


@native
@BOTH
def test_opcheck_and_one_graph(middle: bool) -> None:
    given = arguments((2, 5, 9), middle)
    torch.library.opcheck(torch.ops.fastris.dynamic_mask.default, (*given, RADIUS))
    plain = tuple(None if one is None else one.detach() for one in given)
    torch.library.opcheck(torch.ops.fastris.dynamic_mask_backward.default, (torch.randn(2, 5, 9), *plain, RADIUS))
    compiled = torch.compile(lambda *inputs: dynamic_mask(*inputs, RADIUS).relu(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), dynamic_mask(*given, RADIUS).relu())


@native
def test_second_derivatives_are_refused() -> None:
    given = arguments((1, 4, 4), True)
    (first,) = torch.autograd.grad(dynamic_mask(*given, RADIUS).square().sum(), given[0], create_graph=True)
    with pytest.raises(RuntimeError, match="dynamic_mask: .* no second derivatives"):
        first.sum().backward()


@native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: (g[0].double(), *g[1:]), r"detail must be float32 \(B,8,H,W\)"),
        (lambda g: (g[0][:, :8], *g[1:]), r"with a middle \(B,10,H,W\)"),
        (lambda g: (g[0], g[1][:, :105], *g[2:]), r"with a middle \(B,129\)"),
        (lambda g: (g[0], g[1][:1], *g[2:]), r"filter must be float32"),
        (lambda g: (*g[:2], g[2][:, :1], g[3]), r"centre must be float32 \(B,2\)"),
        (lambda g: (*g[:3], g[3][:1]), r"middle must be float32 \(B,2\)"),
    ],
)
def test_the_kernel_checks_what_it_is_given(change: Any, message: str) -> None:
    given = change(tuple(one.detach() for one in arguments((2, 4, 4), True)))
    with pytest.raises(RuntimeError, match=f"dynamic_mask: .*{message}"):
        torch.ops.fastris.dynamic_mask(*given, RADIUS)


@native
def test_the_backward_checks_the_shape_of_the_gradient() -> None:
    given = tuple(one.detach() for one in arguments((2, 4, 6), True))
    with pytest.raises(RuntimeError, match=r"dynamic_mask: grad must be float32 \(B,H,W\)"):
        torch.ops.fastris.dynamic_mask_backward(torch.zeros(2, 6, 4), *given, RADIUS)


@native
@pytest.mark.parametrize("level", ["default", "avx2"])
def test_every_instruction_set_finds_the_same(level: str, at_simd_level: Any) -> None:
    at_simd_level(
        level,
        """
        import torch
        import fastris.nn
        from fastris import reference

        shapes = (2, 10, 7, 37), (2, 129), (2, 2), (2, 2)
        given = [torch.randn(shape, requires_grad=True) for shape in shapes]
        results = []
        for call in (torch.ops.fastris.dynamic_mask, reference.dynamic_mask):
            logits = call(*given, 16.0)
            results.append((logits, *torch.autograd.grad(logits.square().sum(), given)))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-2)
        """,
    )
