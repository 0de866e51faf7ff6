"""The pointwise half of a ConvLSTM cell."""

from __future__ import annotations

import torch
from torch import Tensor


def lstm_gates(
    gates: Tensor,
    cell_prev: Tensor,
    addend: Tensor | None = None,
    bias: Tensor | None = None,
    peephole: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One LSTM update from gate pre-activations: ``c = f·c_prev + i·g``, ``h = o·tanh(c)``.

    i, f and o are sigmoids of their pre-activations and g is the tanh of its own.

    Args:
        gates: (B, 4C, H, W) pre-activations in the order i, f, o, g; any floating dtype.
        cell_prev: (B, C, H, W) previous cell state; may be fp32 beside bf16 or fp16 gates.
        addend: optional second pre-activation of the shape of ``gates`` (the hoisted input part).
        bias: optional (4C,).
        peephole: optional (3C,), the weights by which i and f also see ``cell_prev``, and o the new cell.

    Returns:
        ``(hidden, cell)``, both (B, C, H, W): hidden in the dtype of ``gates``, cell in that of ``cell_prev``.
        The arithmetic is fp64 for fp64 inputs and fp32 otherwise.

    Source: Shi et al., *Convolutional LSTM Network*, NIPS 2015, eq. 3; without peepholes as in Romera-Paredes & Torr,
    ECCV 2016, eq. 2 and its released code.
    """
    compute = torch.float64 if gates.dtype == torch.float64 else torch.float32
    total = gates.to(compute)
    if addend is not None:
        total = total + addend.to(compute)
    if bias is not None:
        total = total + bias.to(compute).view(1, -1, 1, 1)
    i, f, o, g = total.chunk(4, dim=1)
    cell_prev_wide = cell_prev.to(compute)
    if peephole is not None:
        w_i, w_f, w_o = peephole.to(compute).view(3, -1, 1, 1)
        i, f = i + w_i * cell_prev_wide, f + w_f * cell_prev_wide
    cell = torch.sigmoid(f) * cell_prev_wide + torch.sigmoid(i) * torch.tanh(g)
    if peephole is not None:
        o = o + w_o * cell
    hidden = torch.sigmoid(o) * torch.tanh(cell)
    return hidden.to(gates.dtype), cell.to(cell_prev.dtype)
