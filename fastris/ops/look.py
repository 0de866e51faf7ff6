"""``look``: what is in the most likely cell of a map, ``torch.ops.fastris.look``.

B = batch, C = channels of the hidden state, F = of the features. Native on the CPU in fp32, where it is one operator in
place of some twenty small ones; on CUDA and in other dtypes the reference runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastris import reference
from fastris.ops.arguments import native_in_fp32
from fastris.ops.autograd import with_gradients
from fastris.ops.conv2d_same import empty_channels_last
from fastris.reference.look import Look

# Schema. `chosen` is the number of the cell, row by row; there may be no gradient of a result.

_library = torch.library.Library("fastris", "FRAGMENT")
_library.define(
    "look(Tensor logits, Tensor hidden, Tensor features)"
    " -> (Tensor log_place, Tensor place, Tensor seen, Tensor attended, Tensor centre, Tensor chosen)"
)
_library.define(
    "look_backward(Tensor? d_log_place, Tensor? d_seen, Tensor? d_attended, Tensor log_place, Tensor chosen,"
    " SymInt channels, SymInt others) -> (Tensor d_logits, Tensor d_hidden, Tensor d_features)"
)

# Fake kernels; csrc/ registers those of the CPU


def _fake(logits: Tensor, hidden: Tensor, features: Tensor) -> tuple[Tensor, ...]:
    batch, both = logits.shape[0], hidden.shape[1] + features.shape[1]
    rows = (logits.new_empty(batch, width) for width in (both, both + 1, 2))
    return (
        logits.new_empty(logits.shape),
        logits.new_empty(logits.shape),
        *rows,
        logits.new_empty(batch, dtype=torch.int64),
    )


def _fake_backward(
    d_log_place: Tensor | None,
    d_seen: Tensor | None,
    d_attended: Tensor | None,
    log_place: Tensor,
    chosen: Tensor,
    channels: int,
    others: int,
) -> tuple[Tensor, ...]:
    maps = (empty_channels_last(log_place.unsqueeze(1), count) for count in (channels, others))
    return log_place.new_empty(log_place.shape), *maps


torch.library.register_fake("fastris::look", _fake, lib=_library)
torch.library.register_fake("fastris::look_backward", _fake_backward, lib=_library)

# Autograd


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, hidden, features = inputs
    log_place, place, _, _, centre, chosen = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(place, centre, chosen)
    ctx.channels = hidden.shape[1], features.shape[1]
    ctx.save_for_backward(log_place, chosen)


def _gradients(
    ctx: Any, d_log_place: Tensor | None, _: Any, d_seen: Tensor | None, d_attended: Tensor | None, *others: Any
) -> tuple[Tensor, ...]:
    return _operator_backward(d_log_place, d_seen, d_attended, *ctx.saved_tensors, *ctx.channels)


_operator, _operator_backward = with_gradients(_library, "look", _gradients, _setup_context)

# The door


def look(logits: Tensor, hidden: Tensor, features: Tensor) -> Look:
    """Look at the most likely cell; shapes and results as in :func:`fastris.reference.look`."""
    if not native_in_fp32("look", logits, hidden, features):
        return reference.look(logits, hidden, features)
    return Look(*_operator(logits.contiguous(), hidden, features)[:5])
