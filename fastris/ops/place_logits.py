"""``place_logits``: which cell a step looks at, ``torch.ops.fastris.place_logits``.

B = batch, C = channels of the hidden state, K = of what was found, N = between the two layers. Native on the CPU in
fp32, where a tile of cells goes through both layers at once; on CUDA and in other dtypes the reference runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastris import reference
from fastris.ops.arguments import native_in_fp32
from fastris.ops.autograd import with_gradients
from fastris.ops.conv2d_same import channels_last, empty_channels_last

# Schema. Gradients come for all but found, those of maps in channels_last.

_library = torch.library.Library("fastris", "FRAGMENT")
_library.define(
    "place_logits(Tensor hidden, Tensor base, Tensor? found, Tensor weight, Tensor last, Tensor last_bias) -> Tensor"
)
_library.define(
    "place_logits_backward(Tensor grad, Tensor hidden, Tensor base, Tensor? found, Tensor weight, Tensor last,"
    " Tensor last_bias) -> (Tensor d_hidden, Tensor d_base, Tensor d_weight, Tensor d_last, Tensor d_last_bias)"
)

# Fake kernels; csrc/ registers those of the CPU


def _fake(
    hidden: Tensor, base: Tensor, found: Tensor | None, weight: Tensor, last: Tensor, last_bias: Tensor
) -> Tensor:
    return hidden.new_empty(hidden.shape[0], *hidden.shape[2:])


def _fake_backward(
    grad: Tensor,
    hidden: Tensor,
    base: Tensor,
    found: Tensor | None,
    weight: Tensor,
    last: Tensor,
    last_bias: Tensor,
) -> tuple[Tensor, ...]:
    maps = (empty_channels_last(one, one.shape[1]) for one in (hidden, base))
    return (*maps, *(one.new_empty(one.shape) for one in (weight, last, last_bias)))


torch.library.register_fake("fastris::place_logits", _fake, lib=_library)
torch.library.register_fake("fastris::place_logits_backward", _fake_backward, lib=_library)

# Autograd


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    d_hidden, d_base, *d_weights = _operator_backward(grad, *ctx.saved_tensors)
    return d_hidden, d_base, None, *d_weights


_operator, _operator_backward = with_gradients(_library, "place_logits", _gradients, _setup_context)

# The door


def place_logits(
    hidden: Tensor, base: Tensor, found: Tensor | None, weight: Tensor, last: Tensor, last_bias: Tensor
) -> Tensor:
    """Which cell to look at; shapes and results as in :func:`fastris.reference.place_logits`."""
    if not native_in_fp32("place_logits", hidden, base, found, weight, last, last_bias):
        return reference.place_logits(hidden, base, found, weight, last, last_bias)
    hidden, base = channels_last(hidden), channels_last(base)
    found = None if found is None else channels_last(found)
    return _operator(hidden, base, found, weight, last, last_bias)
