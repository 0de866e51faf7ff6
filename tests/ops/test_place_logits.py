"""place_logits: the tiles of the CPU against the reference, and the reference against its definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastris
from fastris import backend, reference
from fastris.ops.place_logits import place_logits

native = pytest.mark.skipif(backend.native_error() is not None, reason="fastris._C is not built")

SHAPES = [  # B, C, K, N, H, W
    (2, 32, 2, 32, 16, 18),
    (3, 30, 0, 20, 7, 5),  # no whole vectors; cells that no whole tiles cover
    (1, 5, 3, 8, 1, 3),  # fewer cells than a tile
    (2, 100, 2, 48, 9, 10),  # sums so long that they are made of shorter ones
]
OTHERS = 3  # columns of the weight that are for neither hidden nor found
Arguments = tuple[Tensor | None, ...]


def arguments(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Arguments:
    """With leaves of everything but found."""
    batch, channels, more, inner, height, width = shape

    def maps(count: int) -> Tensor:
        return torch.randn(batch, height, width, count, dtype=dtype).permute(0, 3, 1, 2)

    hidden, base = maps(channels).requires_grad_(), maps(inner).requires_grad_()
    weights = [torch.randn(*size, dtype=dtype) for size in ((inner, channels + OTHERS + more), (inner,), (1,))]
    weights[0] /= (channels + more) ** 0.5
    return hidden, base, maps(more) if more else None, *(one.requires_grad_() for one in weights)


def cast(given: Arguments, dtype: torch.dtype) -> Arguments:
    return tuple(None if one is None else one.detach().to(dtype).requires_grad_(one.requires_grad) for one in given)


def results(given: Arguments, call: Callable[..., Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    logits = call(*given)
    leaves = [one for one in given if one is not None and one.requires_grad]
    return (logits, *torch.autograd.grad(logits, leaves, grad.to(logits.dtype)))


def test_the_reference_is_two_convolutions() -> None:
    hidden, base, found, weight, last, last_bias = arguments((2, 6, 2, 5, 4, 3), torch.float64)
    seen = torch.cat([hidden, torch.zeros(2, OTHERS, 4, 3, dtype=torch.float64), found], 1)
    inner = base + F.conv2d(seen, weight[:, :, None, None])
    expected = F.conv2d(inner.relu(), last[None, :, None, None], last_bias).squeeze(1)
    torch.testing.assert_close(place_logits(hidden, base, found, weight, last, last_bias), expected)


def test_gradients_of_the_reference() -> None:
    hidden, base, found, weight, last, last_bias = arguments((1, 3, 2, 4, 2, 3), torch.float64)
    moving = [one.detach().requires_grad_() for one in (hidden, base, weight, last, last_bias)]

    def call(hidden: Tensor, base: Tensor, *weights: Tensor) -> Tensor:
        return reference.place_logits(hidden, base, found, *weights)

    assert torch.autograd.gradcheck(call, moving)
    found.requires_grad_()
    assert torch.autograd.grad(call(*moving).sum(), found, allow_unused=True) == (None,)


@native
@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_at_most_twice_that_of_eager(
    shape: tuple[int, ...], no_worse_than_eager: Any, poisoned_memory: Any
) -> None:
    given = arguments(shape)
    grad = torch.randn(shape[0], *shape[4:])
    with poisoned_memory():
        found = results(given, torch.ops.fastris.place_logits, grad)
    eager = results(cast(given, torch.float32), reference.place_logits, grad)
    exact = results(cast(given, torch.float64), reference.place_logits, grad.double())
    no_worse_than_eager(found, eager, exact)


@native
def test_any_layout_is_taken_and_gradients_are_channels_last() -> None:
    given = arguments(SHAPES[0])
    grad = torch.randn(2, 18, 16).transpose(1, 2)  # of a view
    expected = results(given, place_logits, grad)
    other = tuple(None if one is None else one.detach().clone(memory_format=torch.contiguous_format) for one in given)
    other = tuple(one if one is None or k == 2 else one.requires_grad_() for k, one in enumerate(other))
    found = results(other, place_logits, grad)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    for one in torch.autograd.grad(place_logits(*given).sum(), given[:2]):
        assert one.is_contiguous(memory_format=torch.channels_last)


@native
@pytest.mark.parametrize("inner", [32, 20])
def test_the_bits_do_not_depend_on_the_threads(inner: int, by_threads: Any) -> None:
    given, grad = arguments((2, 32, 2, inner, 16, 18)), torch.randn(2, 16, 18)
    runs = by_threads(lambda: results(given, torch.ops.fastris.place_logits, grad))
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


@native
@pytest.mark.parametrize("inner", [32, 20])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_nan_or_infinity_stays_in_its_cell(inner: int, value: float) -> None:
    given = arguments((2, 30, 2, inner, 10, 12))

    def elsewhere() -> list[Tensor]:
        """Logits and gradients of the maps in all cells but the first."""
        logits = torch.ops.fastris.place_logits(*given).flatten()[1:]
        gradients = torch.autograd.grad(logits.sum(), given[:2])
        return [logits, *(one.permute(0, 2, 3, 1).flatten(0, 2)[1:] for one in gradients)]

    expected = elsewhere()
    with torch.no_grad():
        given[0][0, 3, 0, 0] = value
    assert not torch.ops.fastris.place_logits(*given)[0, 0, 0].isfinite()
    assert all(torch.equal(one, other) for one, other in zip(elsewhere(), expected, strict=True))


def test_other_dtypes_autocast_and_the_reference_back_end_take_the_reference() -> None:
    given = arguments(SHAPES[1])
    wide = cast(given, torch.float64)
    torch.testing.assert_close(place_logits(*wide), reference.place_logits(*wide), rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert place_logits(*given).dtype == torch.bfloat16
    with fastris.use_backend("reference"):
        assert torch.equal(place_logits(*given), reference.place_logits(*given))


@native
def test_no_images() -> None:
    given = arguments((0, 8, 2, 8, 4, 4))
    logits, d_hidden, d_base, *d_weights = results(given, place_logits, torch.zeros(0, 4, 4))
    assert logits.shape == (0, 4, 4) and d_hidden.shape == (0, 8, 4, 4) and d_base.shape == (0, 8, 4, 4)
    assert not any(one.any() for one in d_weights)


@native
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_opcheck_and_one_graph(shape: tuple[int, ...]) -> None:
    given = arguments(shape)
    torch.library.opcheck(torch.ops.fastris.place_logits.default, given)
    plain = tuple(None if one is None else one.detach() for one in given)
    grad = torch.randn(shape[0], *shape[4:])
    torch.library.opcheck(torch.ops.fastris.place_logits_backward.default, (grad, *plain))
    compiled = torch.compile(lambda *inputs: place_logits(*inputs).relu(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), place_logits(*given).relu())


@native
def test_second_derivatives_are_refused() -> None:
    given = arguments(SHAPES[1])
    (first,) = torch.autograd.grad(place_logits(*given).square().sum(), given[0], create_graph=True)
    with pytest.raises(RuntimeError, match="place_logits: .* no second derivatives"):
        first.sum().backward()


@native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: (g[0].contiguous(), *g[1:]), "hidden must be channels_last"),
        (lambda g: (g[0].double(), *g[1:]), "hidden must be float32"),
        (lambda g: (g[0], g[1][:1], *g[2:]), "base must be float32 .* like hidden"),
        (lambda g: (*g[:3], g[3][:, :33], *g[4:]), r"weight must be float32 \(N,C\+K or more\)"),
        (lambda g: (*g[:4], g[4][:3], g[5]), r"last must be float32 \(N\)"),
        (lambda g: (*g[:5], torch.zeros(2)), r"last_bias must be float32 \(1\)"),
    ],
)
def test_the_kernel_checks_what_it_is_given(change: Any, message: str) -> None:
    given = change(tuple(one.detach() for one in arguments(SHAPES[0])))
    with pytest.raises(RuntimeError, match=f"place_logits: {message}"):
        torch.ops.fastris.place_logits(*given)


@native
def test_the_backward_checks_the_shape_of_the_gradient() -> None:
    given = tuple(one.detach() for one in arguments(SHAPES[0]))
    with pytest.raises(RuntimeError, match=r"place_logits: grad must be float32 \(B,H,W\)"):
        torch.ops.fastris.place_logits_backward(torch.zeros(2, 18, 16), *given)


@native
@pytest.mark.parametrize("level", ["default", "avx2"])
def test_every_instruction_set_finds_the_same(level: str, at_simd_level: Any) -> None:
    at_simd_level(
        level,
        """
        import torch
        import fastris.nn
        from fastris import reference

        maps = [torch.randn(2, 7, 9, c).permute(0, 3, 1, 2) for c in (37, 20, 2)]
        weights = [torch.randn(20, 39) / 6, torch.randn(20), torch.randn(1)]
        moving = [one.requires_grad_() for one in (*maps[:2], *weights)]
        results = []
        for call in (torch.ops.fastris.place_logits, reference.place_logits):
            logits = call(*maps, *weights)
            results.append((logits, *torch.autograd.grad(logits.square().sum(), moving)))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
        """,
    )
