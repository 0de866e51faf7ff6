"""image_masks: the rows of the CPU against the reference, and the reference against its definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastris
from fastris import backend, reference
from fastris.ops.image_masks import image_masks

native = pytest.mark.skipif(backend.native_error() is not None, reason="fastris._C is not built")

SHAPES = [  # B, T, h, w, stride, offset, (H, W)
    (2, 3, 16, 18, 2, 0, (32, 36)),
    (1, 2, 7, 5, 4, 3, (22, 17)),  # an image within its maps, whose rows are no whole vectors
    (2, 1, 6, 9, 3, 1, (17, 26)),  # an odd stride, which has pixels in the middle of a cell
    (1, 2, 5, 9, 1, 1, (4, 8)),
    (2, 2, 1, 1, 8, 2, (3, 5)),  # one cell, fewer pixels than a vector
    (1, 1, 9, 40, 8, 4, (60, 300)),
]
Arguments = tuple[Tensor, int, int, tuple[int, int], Tensor]


def arguments(shape: tuple[Any, ...], dtype: torch.dtype = torch.float32) -> Arguments:
    """The last pixels of a row are void in whole stretches of the first image, and a few others everywhere."""
    batch, steps, height, width, stride, offset, size = shape
    logits = 4 * torch.randn(batch, steps, height, width, dtype=dtype)
    void = torch.rand(batch, *size) < 0.05
    void[:1, :, size[1] // 2 :] = True
    return logits.requires_grad_(), stride, offset, size, void


def cast(given: Arguments, dtype: torch.dtype) -> Arguments:
    return given[0].detach().to(dtype).requires_grad_(), *given[1:]


def results(given: Arguments, call: Callable[..., Tensor], grad: Tensor) -> tuple[Tensor, Tensor]:
    masks = call(*given)
    return masks, torch.autograd.grad(masks, given[0], grad.to(masks.dtype))[0]


def test_the_reference_is_its_definition() -> None:
    logits, stride, offset, size, void = arguments(SHAPES[2], torch.float64)
    expected = torch.zeros(2, 1, *size, dtype=torch.float64)
    for y in range(size[0]):
        for x in range(size[1]):
            value = torch.zeros(2, 1, dtype=torch.float64)
            row, column = ((place + offset + 0.5) / stride - 0.5 for place in (y, x))
            for i in range(-1, 7):
                for j in range(-1, 10):
                    weight = max(0.0, 1 - abs(row - i)) * max(0.0, 1 - abs(column - j))
                    value += weight * logits[:, :, min(max(i, 0), 5), min(max(j, 0), 8)].detach()
            expected[:, :, y, x] = torch.where(void[:, None, y, x], 0.0, value.sigmoid())
    torch.testing.assert_close(image_masks(logits, stride, offset, size, void), expected)
    few = logits[:1, :, :2, :2].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda one: image_masks(one, stride, offset, (4, 5), void[:1, :4, :5]), few)


@native
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_void", [True, False])
def test_error_is_at_most_twice_that_of_eager(
    shape: tuple[Any, ...], with_void: bool, no_worse_than_eager: Any, poisoned_memory: Any
) -> None:
    given = arguments(shape) if with_void else (*arguments(shape)[:4], None)
    grad = torch.randn(*shape[:2], *shape[6])
    with poisoned_memory():
        found = results(given, image_masks, grad)
    eager = results(cast(given, torch.float32), reference.image_masks, grad)
    exact = results(cast(given, torch.float64), reference.image_masks, grad.double())
    no_worse_than_eager(found, eager, exact)


@native
def test_void_pixels_are_0_and_take_no_gradient_whatever_it_is() -> None:
    given = arguments(SHAPES[0])
    void, grad = given[4], torch.randn(2, 3, 32, 36)
    masks, expected = results(given, image_masks, grad)
    assert not masks[void.unsqueeze(1).expand_as(masks)].any()
    _, found = results(given, image_masks, torch.where(void.unsqueeze(1), torch.nan, grad))
    assert torch.equal(found, expected)


@native
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 200.0, -200.0])
def test_logits_of_any_size(value: float) -> None:
    logits = torch.zeros(1, 2, 4, 4)
    logits[0, 0] = value
    masks = image_masks(logits, 2, 0, (8, 8))
    torch.testing.assert_close(masks[0, 0], torch.full((8, 8), value).sigmoid(), equal_nan=True)
    assert torch.equal(masks[0, 1], torch.full((8, 8), 0.5))
    logits[0, 1, 1, 2] = value  # next to cells of 0
    torch.testing.assert_close(image_masks(logits, 1, 0, (4, 4)), logits.sigmoid(), equal_nan=True)


@native
def test_any_layout_is_taken() -> None:
    given, grad = arguments(SHAPES[0]), torch.randn(2, 3, 36, 32).transpose(2, 3)
    expected = results(given, image_masks, grad)
    logits = given[0].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    void = given[4].transpose(1, 2).contiguous().transpose(1, 2)
    found = results((logits, *given[1:4], void), image_masks, grad)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@native
def test_the_bits_do_not_depend_on_the_threads(by_threads: Any) -> None:
    given, grad = arguments(SHAPES[0]), torch.randn(2, 3, 32, 36)
    runs = by_threads(lambda: results(given, image_masks, grad))
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


@native
def test_a_pixel_does_not_depend_on_the_width_of_its_image() -> None:
    """Rows of fewer pixels than a vector take the same arithmetic one by one."""
    logits = 8 * torch.randn(2, 1, 64, 16)
    whole = image_masks(logits, 2, 0, (128, 32))
    for width in range(2, 32):  # the last pixels of these maps have no cell to their right
        narrow = image_masks(logits[..., : width // 2 + 1], 2, 0, (128, width))
        assert torch.equal(narrow, whole[..., :width]), width


def test_other_dtypes_autocast_and_the_reference_back_end_take_the_reference() -> None:
    given = arguments(SHAPES[1])
    wide = cast(given, torch.float64)
    assert torch.equal(image_masks(*wide), reference.image_masks(*wide))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(image_masks(*given), reference.image_masks(*given))
    with fastris.use_backend("reference"):
        assert torch.equal(image_masks(*given), reference.image_masks(*given))


@native
@pytest.mark.parametrize("shape", [(0, 2, 3, 4, 2, 0, (6, 8)), (2, 0, 3, 4, 2, 0, (6, 8)), (1, 2, 3, 4, 2, 0, (6, 0))])
def test_nothing(shape: tuple[Any, ...]) -> None:
    given = arguments(shape)
    masks, d_logits = results(given, image_masks, torch.zeros(*shape[:2], *shape[6]))
    assert masks.shape == (*shape[:2], *shape[6])
    assert d_logits.shape == given[0].shape and not d_logits.any()


@native
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_opcheck_and_one_graph(shape: tuple[Any, ...]) -> None:
    logits, stride, offset, size, void = arguments(shape)
    torch.library.opcheck(torch.ops.fastris.image_masks.default, (logits, void, stride, offset, *size))
    torch.library.opcheck(torch.ops.fastris.image_masks.default, (logits, None, stride, offset, *size))
    masks = image_masks(logits.detach(), stride, offset, size, void)
    backward = (torch.randn_like(masks), masks, stride, offset, *logits.shape[2:])
    torch.library.opcheck(torch.ops.fastris.image_masks_backward.default, backward)
    compiled = torch.compile(
        lambda *one: image_masks(*one, stride, offset, size, void).exp(), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(logits), image_masks(logits, stride, offset, size, void).exp())


@native
def test_second_derivatives_are_refused() -> None:
    logits, *others = arguments(SHAPES[1])
    (first,) = torch.autograd.grad(image_masks(logits, *others).square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="image_masks: .* no second derivatives"):
        first.sum().backward()


@native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, v: (x.double(), v, 2, 0, 32, 36), r"logits must be contiguous float32 \(B,T,h,w\)"),
        (lambda x, v: (x.mT, v, 2, 0, 32, 36), r"logits must be contiguous float32 \(B,T,h,w\)"),
        (lambda x, v: (x, v.int(), 2, 0, 32, 36), r"void must be contiguous bool \(B,H,W\)"),
        (lambda x, v: (x, v[:1], 2, 0, 32, 36), r"void must be contiguous bool \(B,H,W\)"),
        (lambda x, v: (x, v, 0, 0, 32, 36), "stride must be positive"),
        (lambda x, v: (x, v, 2**40, 0, 32, 36), "at most 65536"),
        (lambda x, v: (x, v, 2, -1, 32, 36), "offset not negative"),
        (lambda x, v: (x, v, 2, 2**62, 32, 36), "the maps must cover the image"),
        (lambda x, v: (x, v, 2, 1, 32, 36), "the maps must cover the image"),
    ],
)
def test_the_kernel_checks_what_it_is_given(change: Any, message: str) -> None:
    logits, _, _, _, void = arguments(SHAPES[0])
    with pytest.raises(RuntimeError, match=f"image_masks: .*{message}"):
        torch.ops.fastris.image_masks(*change(logits.detach(), void))


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_the_door_checks_sizes(backend: str) -> None:
    logits, _, _, _, void = arguments(SHAPES[0])
    with fastris.use_backend(backend if fastris.backend.native_error() is None else "reference"):
        for offset, size in ((0, (33, 36)), (1, (32, 36))):
            with pytest.raises(ValueError, match="image_masks: logits must cover .* got float32 "):
                image_masks(logits, 2, offset, size)
        with pytest.raises(ValueError, match=r"image_masks: void must be \(2,30,36\), got bool \(2,32,36\)"):
            image_masks(logits, 2, 0, (30, 36), void)


@native
def test_the_backward_checks_what_it_is_given() -> None:
    masks = torch.rand(2, 3, 32, 36)
    for grad, given in ((masks[:1], masks), (masks.double(), masks), (masks, masks.mT)):
        with pytest.raises(RuntimeError, match="image_masks: (grad|masks) must be contiguous float32"):
            torch.ops.fastris.image_masks_backward(grad, given, 2, 0, 16, 18)
    with pytest.raises(RuntimeError, match="image_masks: the maps must cover the image"):
        torch.ops.fastris.image_masks_backward(masks, masks, 2, 0, 15, 18)


@native
@pytest.mark.parametrize("level", ["default", "avx2"])
def test_every_instruction_set_finds_the_same(level: str, at_simd_level: Any) -> None:
    at_simd_level(
        level,
        """
        import torch
        from fastris import reference
        from fastris.ops.image_masks import image_masks

        for size in ((5, 3), (30, 44)):
            logits, void = torch.randn(2, 3, 8, 12, requires_grad=True), torch.rand(2, *size) < 0.1
            results = []
            for call in (image_masks, reference.image_masks):
                masks = call(logits, 4, 2, size, void)
                results.append((masks, torch.autograd.grad(masks.square().sum(), logits)[0]))
            for ours, theirs in zip(*results, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        """,
    )
