"""``image_masks``: masks of an image's pixels from the logits of a map's cells, ``torch.ops.fastris.image_masks``.

B = batch, T = steps, h × w = a map's cells, H × W = pixels. Native on the CPU in fp32, where rows are enlarged, made
masks and rid of void pixels in one pass, and so is their gradient; on CUDA and in other dtypes the reference runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastris import reference
from fastris.ops.arguments import describe, native_in_fp32
from fastris.ops.autograd import with_gradients

# Schema. The gradient is that of the logits, from the masks that came out.

_library = torch.library.Library("fastris", "FRAGMENT")
_library.define(
    "image_masks(Tensor logits, Tensor? void, SymInt stride, SymInt offset, SymInt height, SymInt width) -> Tensor"
)
_library.define(
    "image_masks_backward(Tensor grad, Tensor masks, SymInt stride, SymInt offset, SymInt map_height, SymInt map_width)"
    " -> Tensor"
)

# Fake kernels; csrc/ registers those of the CPU


def _fake(logits: Tensor, void: Tensor | None, stride: int, offset: int, height: int, width: int) -> Tensor:
    return logits.new_empty(*logits.shape[:2], height, width)


def _fake_backward(grad: Tensor, masks: Tensor, stride: int, offset: int, map_height: int, map_width: int) -> Tensor:
    return masks.new_empty(*masks.shape[:2], map_height, map_width)


torch.library.register_fake("fastris::image_masks", _fake, lib=_library)
torch.library.register_fake("fastris::image_masks_backward", _fake_backward, lib=_library)

# Autograd


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, _, ctx.stride, ctx.offset, *_ = inputs
    ctx.map_size = logits.shape[2:]
    ctx.save_for_backward(output)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (masks,) = ctx.saved_tensors
    d_logits = _operator_backward(grad.contiguous(), masks, ctx.stride, ctx.offset, *ctx.map_size)
    return d_logits, None, None, None, None, None


_operator, _operator_backward = with_gradients(_library, "image_masks", _gradients, _setup_context)

# The door


def image_masks(logits: Tensor, stride: int, offset: int, size: tuple[int, int], void: Tensor | None = None) -> Tensor:
    """Masks in every pixel of an image; shapes and results as in :func:`fastris.reference.image_masks`.

    Raises:
        ValueError: maps that do not cover the image, or void pixels of another one.
    """
    (batch, _, *cells), (height, width) = logits.shape, size
    if offset + height > cells[0] * stride or offset + width > cells[1] * stride:
        raise ValueError(
            f"image_masks: logits must cover {size} pixels from {offset} on, {stride} a cell, got {describe(logits)}"
        )
    if void is not None and tuple(void.shape) != (batch, height, width):
        raise ValueError(f"image_masks: void must be ({batch},{height},{width}), got {describe(void)}")
    if stride == 1 or not native_in_fp32("image_masks", logits):
        return reference.image_masks(logits, stride, offset, size, void)
    void = None if void is None else void.contiguous()
    return _operator(logits.contiguous(), void, stride, offset, *size)
