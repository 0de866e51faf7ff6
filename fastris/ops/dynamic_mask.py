"""``dynamic_mask``: the mask that a filter of its own draws, ``torch.ops.fastris.dynamic_mask``.

B = batch. Native on the CPU in fp32, where nothing between detail and mask leaves the registers; on CUDA and in other
dtypes the reference runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastris import reference
from fastris.ops.arguments import native_in_fp32
from fastris.ops.autograd import with_gradients

# Schema. Without a middle its gradient is empty.

_library = torch.library.Library("fastris", "FRAGMENT")
_library.define("dynamic_mask(Tensor detail, Tensor filter, Tensor centre, Tensor? middle, float radius) -> Tensor")
_library.define(
    "dynamic_mask_backward(Tensor grad, Tensor detail, Tensor filter, Tensor centre, Tensor? middle, float radius)"
    " -> (Tensor d_detail, Tensor d_filter, Tensor d_centre, Tensor d_middle)"
)

# Fake kernels; csrc/ registers those of the CPU


def _fake(detail: Tensor, filter: Tensor, centre: Tensor, middle: Tensor | None, radius: float) -> Tensor:
    return detail.new_empty(detail.shape[0], *detail.shape[2:])


def _fake_backward(
    grad: Tensor, detail: Tensor, filter: Tensor, centre: Tensor, middle: Tensor | None, radius: float
) -> tuple[Tensor, ...]:
    shapes = detail.shape, filter.shape, centre.shape, centre.shape if middle is not None else (0, 2)
    return tuple(detail.new_empty(shape) for shape in shapes)


torch.library.register_fake("fastris::dynamic_mask", _fake, lib=_library)
torch.library.register_fake("fastris::dynamic_mask_backward", _fake_backward, lib=_library)

# Autograd


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.radius = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *gradients, d_middle = _operator_backward(grad, *ctx.saved_tensors, ctx.radius)
    return *gradients, None if ctx.saved_tensors[3] is None else d_middle, None


_operator, _operator_backward = with_gradients(_library, "dynamic_mask", _gradients, _setup_context)

# The door


def dynamic_mask(detail: Tensor, filter: Tensor, centre: Tensor, middle: Tensor | None, radius: float) -> Tensor:
    """Draw a mask; shapes, results and source as in :func:`fastris.reference.dynamic_mask`."""
    if not native_in_fp32("dynamic_mask", detail, filter, centre, middle):
        return reference.dynamic_mask(detail, filter, centre, middle, radius)
    return _operator(detail, filter, centre, middle, radius)
