"""``group_norm_relu``: group normalisation and the rectifier after it, ``torch.ops.fastris.group_norm_relu``.

B = batch. Native on the CPU in fp32, in channels_last, where PyTorch's own gradient takes several times as long as the
memory it moves; on CUDA and in other dtypes the reference runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastris import reference
from fastris.ops.arguments import native_in_fp32
from fastris.ops.autograd import with_gradients
from fastris.ops.conv2d_same import channels_last, empty_channels_last

# Schema. Maps are channels_last, grad too; mean and rstd, one over the standard deviation, (B, groups).

_library = torch.library.Library("fastris", "FRAGMENT")
_library.define(
    "group_norm_relu(Tensor x, Tensor weight, Tensor bias, int groups, float eps)"
    " -> (Tensor y, Tensor mean, Tensor rstd)"
)
_library.define(
    "group_norm_relu_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, int groups)"
    " -> (Tensor d_x, Tensor d_weight, Tensor d_bias)"
)

# Fake kernels; csrc/ registers those of the CPU


def _fake(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, ...]:
    batch, channels = x.shape[:2]
    return empty_channels_last(x, channels), *(x.new_empty(batch, groups) for _ in range(2))


def _fake_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, groups: int
) -> tuple[Tensor, ...]:
    return empty_channels_last(x, x.shape[1]), torch.empty_like(weight), torch.empty_like(bias)


torch.library.register_fake("fastris::group_norm_relu", _fake, lib=_library)
torch.library.register_fake("fastris::group_norm_relu_backward", _fake_backward, lib=_library)

# Autograd


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, ctx.groups, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, bias, mean, rstd)


def _gradients(ctx: Any, grad: Tensor, *others: Any) -> tuple[Tensor | None, ...]:
    d_x, d_weight, d_bias = _operator_backward(channels_last(grad), *ctx.saved_tensors, ctx.groups)
    return d_x, d_weight, d_bias, None, None


_operator, _operator_backward = with_gradients(_library, "group_norm_relu", _gradients, _setup_context)

# The door


def group_norm_relu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float = 1e-5) -> Tensor:
    """Normalise and rectify; shapes and results as in :func:`fastris.reference.group_norm_relu`."""
    if not native_in_fp32("group_norm_relu", x, weight, bias):
        return reference.group_norm_relu(x, weight, bias, groups, eps)
    y, _, _ = _operator(channels_last(x), weight.contiguous(), bias.contiguous(), groups, eps)
    return y
