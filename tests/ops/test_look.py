"""look: the one operator of the CPU against the reference, and the reference against its definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastris
from fastris import backend, reference
from fastris.ops.look import look

native = pytest.mark.skipif(backend.native_error() is not None, reason="fastris._C is not built")

SHAPES = [  # B, C, F, H, W
    (2, 32, 50, 16, 18),
    (3, 5, 3, 1, 3),  # fewer cells than a vector
    (1, 4, 2, 23, 37),  # several sums, the last of no whole vectors
]
Arguments = tuple[Tensor, Tensor, Tensor]
NAMES = ("log_place", "place", "seen", "attended", "centre")


def arguments(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Arguments:
    batch, channels, others, *size = shape
    given = (
        3 * torch.randn(batch, *size, dtype=dtype),
        torch.randn(batch, *size, channels, dtype=dtype).permute(0, 3, 1, 2),
        torch.randn(batch, others, *size, dtype=dtype),
    )
    return tuple(one.requires_grad_() for one in given)  # type: ignore[return-value]


def cast(given: Arguments, dtype: torch.dtype) -> Arguments:
    return tuple(one.detach().to(dtype).requires_grad_() for one in given)  # type: ignore[return-value]


def results(given: Arguments, call: Callable[..., Any], grads: list[Tensor]) -> tuple[Tensor, ...]:
    found = call(*given)
    moving = [one for one in found if one.requires_grad]
    assert len(moving) == len(grads) == 3
    return (
        *found,
        *torch.autograd.grad(moving, given, [grad.to(one.dtype) for grad, one in zip(grads, moving, strict=True)]),
    )


def gradients(shape: tuple[int, ...]) -> list[Tensor]:
    batch, channels, others, *size = shape
    return [torch.randn(batch, *size), torch.randn(batch, channels + others), torch.randn(batch, channels + others + 1)]


def test_the_reference_is_its_definition() -> None:
    logits, hidden, features = arguments((2, 4, 3, 5, 6), torch.float64)
    with torch.no_grad():
        logits[0, 3, 2] = logits[1, 0, 5] = 9.0
    found = look(logits, hidden, features)
    torch.testing.assert_close(found.log_place, (logits.exp() / logits.exp().sum((1, 2), keepdim=True)).log())
    assert found.centre.tolist() == [[2.5, 3.5], [5.5, 0.5]]
    assert found.place.nonzero().tolist() == [[0, 3, 2], [1, 0, 5]] and found.place.sum() == 2
    both = torch.cat([hidden, features], dim=1)
    expected = torch.stack([both[0, :, 3, 2], both[1, :, 0, 5]])
    assert torch.equal(found.seen, expected)
    assert torch.equal(found.attended, torch.cat([expected, torch.full((2, 1), 9.0, dtype=torch.float64)], dim=1))
    assert torch.autograd.gradcheck(lambda *one: [look(*one)[k] for k in (0, 2, 3)], (logits, hidden, features))


@native
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_error_is_at_most_twice_that_of_eager(
    shape: tuple[int, ...], scale: float, no_worse_than_eager: Any, poisoned_memory: Any
) -> None:
    given, grads = arguments(shape), gradients(shape)
    with torch.no_grad():
        given[0].mul_(scale)
    with poisoned_memory():
        found = results(given, look, grads)
    eager = results(cast(given, torch.float32), reference.look, grads)
    exact = results(cast(given, torch.float64), reference.look, [one.double() for one in grads])
    no_worse_than_eager(found, eager, exact)


@native
@pytest.mark.parametrize("asked", [("log_place",), ("seen",), ("attended",), ("seen", "attended")])
def test_a_result_may_have_no_gradient(asked: tuple[str, ...]) -> None:
    given = arguments(SHAPES[0])
    found, expected = (
        torch.autograd.grad(sum(getattr(call(*given), name).square().sum() for name in asked), given, allow_unused=True)
        for call in (look, reference.look)
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert ours is not None
        torch.testing.assert_close(ours, torch.zeros_like(ours) if theirs is None else theirs)


@native
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_logits_of_any_size(value: float) -> None:
    given = arguments(SHAPES[0])
    with torch.no_grad():
        given[0][0, 4, 7] = value
    for name, ours, theirs in zip(NAMES, look(*given), reference.look(*given), strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}")


@native
def test_of_equal_cells_the_first_is_looked_at() -> None:
    _, hidden, features = arguments(SHAPES[0])
    found = look(torch.zeros(2, 16, 18), hidden, features)
    assert found.centre.tolist() == [[0.5, 0.5]] * 2 and found.place[:, 0, 0].tolist() == [1.0, 1.0]


@native
def test_any_layout_is_taken() -> None:
    given, grads = arguments(SHAPES[0]), gradients(SHAPES[0])
    expected = results(given, look, grads)
    others = given[0].detach().mT.contiguous().mT, given[1].detach().contiguous(), given[2].detach().mT.contiguous().mT
    grads[0], grads[2] = grads[0].mT.contiguous().mT, grads[2].T.contiguous().T
    found = results(tuple(one.requires_grad_() for one in others), look, grads)  # type: ignore[arg-type]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_other_dtypes_autocast_and_the_reference_back_end_take_the_reference() -> None:
    given = arguments(SHAPES[2])
    wide = cast(given, torch.float64)
    assert all(torch.equal(one, other) for one, other in zip(look(*wide), reference.look(*wide), strict=True))
    half = look(*cast(given, torch.bfloat16))
    assert (half.log_place.dtype, half.seen.dtype, half.centre.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(one, other) for one, other in zip(look(*given), reference.look(*given), strict=True))
    with fastris.use_backend("reference"):
        assert all(torch.equal(one, other) for one, other in zip(look(*given), reference.look(*given), strict=True))


@native
def test_the_bits_do_not_depend_on_the_threads(by_threads: Any) -> None:
    shape = (40, 5, 3, 4, 7)  # of several tasks
    given, grads = arguments(shape), gradients(shape)
    runs = by_threads(lambda: results(given, look, grads))
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))
    expected = results(given, reference.look, grads)
    for ours, theirs in zip(runs[0], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@native
def test_no_images() -> None:
    shape = (0, 4, 2, 5, 6)
    found = results(arguments(shape), look, gradients(shape))
    assert [tuple(one.shape) for one in found[:5]] == [(0, 5, 6), (0, 5, 6), (0, 6), (0, 7), (0, 2)]


@native
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_opcheck_and_one_graph(shape: tuple[int, ...]) -> None:
    given = arguments(shape)
    torch.library.opcheck(torch.ops.fastris.look.default, given)
    log_place, _, _, _, _, chosen = torch.ops.fastris.look(*(one.detach() for one in given))
    grads = gradients(shape)
    torch.library.opcheck(torch.ops.fastris.look_backward.default, (*grads, log_place, chosen, *shape[1:3]))
    compiled = torch.compile(lambda *one: look(*one).attended.exp(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), look(*given).attended.exp())


@native
def test_second_derivatives_are_refused() -> None:
    given = arguments(SHAPES[1])
    (first,) = torch.autograd.grad(look(*given).log_place.square().sum(), given[0], create_graph=True)
    with pytest.raises(RuntimeError, match="look: .* no second derivatives"):
        first.sum().backward()


@native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, h, f: (x.double(), h, f), r"logits must be contiguous float32 \(B,H,W\)"),
        (lambda x, h, f: (x.mT, h, f), r"logits must be contiguous float32 \(B,H,W\)"),
        (lambda x, h, f: (x[:, :0].contiguous(), h, f), "logits must have cells"),
        (lambda x, h, f: (x, h[:1], f), "hidden must be float32 .* like logits"),
        (lambda x, h, f: (x, h, f.double()), "features must be float32 .* like logits"),
    ],
)
def test_the_kernel_checks_what_it_is_given(change: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"look: {message}"):
        torch.ops.fastris.look(*change(*(one.detach() for one in arguments(SHAPES[0]))))


@native
def test_the_backward_checks_what_it_is_given() -> None:
    shape = SHAPES[1]
    d_log_place, d_seen, d_attended = gradients(shape)
    log_place, _, _, _, _, chosen = torch.ops.fastris.look(*(one.detach() for one in arguments(shape)))
    for given, message in (
        ((d_log_place[:1], d_seen, d_attended, log_place, chosen), "d_log_place must be float32 like its result"),
        ((d_log_place, d_seen.double(), d_attended, log_place, chosen), "d_seen must be float32 like its result"),
        ((d_log_place, d_seen, d_seen, log_place, chosen), "d_attended must be float32 like its result"),
        ((d_log_place, d_seen, d_attended, log_place.double(), chosen), "log_place must be contiguous float32"),
        ((d_log_place, d_seen, d_attended, log_place, chosen.int()), r"chosen must be contiguous int64 \(B\)"),
        ((d_log_place, d_seen, d_attended, log_place, chosen + 3), "chosen must be cells of log_place"),
    ):
        with pytest.raises(RuntimeError, match=f"look: {message}"):
            torch.ops.fastris.look_backward(*given, *shape[1:3])


@native
@pytest.mark.parametrize("level", ["default", "avx2"])
def test_every_instruction_set_finds_the_same(level: str, at_simd_level: Any) -> None:
    at_simd_level(
        level,
        """
        import torch
        from fastris import reference
        from fastris.ops.look import look

        for side in (1, 19):
            given = [torch.randn(2, *more, side, 13, requires_grad=True) for more in ((), (5,), (7,))]
            results = []
            for call in (look, reference.look):
                found = call(*given)
                moving = sum(one.square().sum() for one in found if one.requires_grad)
                results.append((*found, *torch.autograd.grad(moving, given)))
            for ours, theirs in zip(*results, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        """,
    )
