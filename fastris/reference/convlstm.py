"""A ConvLSTM layer over a whole sequence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastris.reference.lstm_gates import lstm_gates


def convlstm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    hidden: Tensor | None = None,
    cell: Tensor | None = None,
    steps: int | None = None,
    *,
    peephole: Tensor | None = None,
    dilation: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a ConvLSTM layer: at each step the gates are ``conv([x_t, h_{t−1}], weight) + bias``.

    T = steps, B = batch, Cin = input channels, C = hidden channels.

    Args:
        x: (T, B, Cin, H, W), or (B, Cin, H, W) for the same input at every step (then ``steps`` is needed).
        weight: (4C, Cin + C, kh, kw), gate order i, f, o, g; odd kernels keep H and W, and an even kernel
            is padded by one more at the bottom and right.
        bias: optional (4C,).
        hidden, cell: optional initial state, (B, C, H, W) each; zero where not given, the cell in fp32 beside bf16 and
            fp16.
        steps: T, for an ``x`` of four dimensions.
        peephole: optional (3C,), see :func:`fastris.reference.lstm_gates`.
        dilation: pixels between the taps of the kernel.

    Returns:
        ``(outputs, hidden, cell)``: (T, B, C, H, W) and the last state, (B, C, H, W) each.
    """
    if x.dim() == 4:
        if steps is None:
            raise ValueError("convlstm: steps must be given with a constant input x of shape (B, Cin, H, W)")
        sequence = [x] * steps
    else:
        sequence = list(x.unbind(0))
    channels = weight.shape[0] // 4
    batch, _, height, width = x.shape[-4:]
    state_shape = (batch, channels, height, width)
    hidden = x.new_zeros(state_shape) if hidden is None else hidden
    cell = x.new_zeros(state_shape, dtype=torch.promote_types(x.dtype, torch.float32)) if cell is None else cell
    outputs = []
    for x_t in sequence:
        gates = conv2d_same(torch.cat([x_t, hidden], dim=1), weight, dilation=dilation)
        hidden, cell = lstm_gates(gates, cell, bias=bias, peephole=peephole)
        outputs.append(hidden)
    stacked = torch.stack(outputs) if outputs else x.new_zeros((0, *state_shape))
    return stacked, hidden, cell


def conv2d_same(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int = 1, before: Tensor | None = None
) -> Tensor:
    """Stride-1 convolution that keeps H and W; an even kernel is padded by one more at the bottom and right.

    The channels of ``before`` (B, K, H, W) come ahead of those of x, and get no gradient.
    """
    if before is not None:
        x = torch.cat([before.detach(), x], dim=1)
    spans = [dilation * (size - 1) for size in weight.shape[-2:]]
    if not any(span % 2 for span in spans):
        return F.conv2d(x, weight, bias, padding=(spans[0] // 2, spans[1] // 2), dilation=dilation)
    top, left = spans[0] // 2, spans[1] // 2
    return F.conv2d(F.pad(x, (left, spans[1] - left, top, spans[0] - top)), weight, bias, dilation=dilation)
