"""The pointwise half of a ConvLSTM cell."""

from __future__ import annotations

import torch
from torch import Tensor


def lstm_gates(
    gates: Tensor, cell_prev: Tensor, addend: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One LSTM update from gate pre-activations: ``c = f·c_prev + i·g``, ``h = o·tanh(c)``.

    Args:
        gates: (B, 4C, H, W) pre-activations in the order i, f, o, g; any floating dtype.
        cell_prev: (B, C, H, W) previous cell state; may be fp32 beside bf16 or fp16 gates.
        addend: optional second pre-activation of the shape of ``gates`` (the hoisted input part).
        bias: optional (4C,).

    Returns:
        ``(hidden, cell)``, both (B, C, H, W): hidden in the dtype of ``gates``, cell in that of ``cell_prev``.
        The arithmetic is fp64 for fp64 inputs and fp32 otherwise.

    Source: Romera-Paredes & Torr, ECCV 2016, eq. 2 (no peepholes, as in the released code).
    """
    compute = torch.float64 if gates.dtype == torch.float64 else torch.float32
    total = gates.to(compute)
    if addend is not None:
        total = total + addend.to(compute)
    if bias is not None:
        total = total + bias.to(compute).view(1, -1, 1, 1)
    i, f, o, g = total.chunk(4, dim=1)
    cell = torch.sigmoid(f) * cell_prev.to(compute) + torch.sigmoid(i) * torch.tanh(g)
    hidden = torch.sigmoid(o) * torch.tanh(cell)
    return hidden.to(gates.dtype), cell.to(cell_prev.dtype)
