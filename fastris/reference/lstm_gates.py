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


def lstm_gates_backward(
    gates: Tensor,
    cell_prev: Tensor,
    addend: Tensor | None,
    bias: Tensor | None,
    peephole: Tensor | None,
    d_hidden: Tensor | None,
    d_cell: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`lstm_gates`, with its activations computed again.

    Args:
        gates, cell_prev, addend, bias, peephole: the arguments of :func:`lstm_gates`.
        d_hidden, d_cell: (B, C, H, W) gradients of its results; None is zero.

    Returns:
        ``(d_gates, d_cell_prev, d_bias, d_peephole)`` in the shapes and dtypes of the arguments; d_gates is also that
        of ``addend``, in the wider dtype, and the last two are empty where there is no bias and no peephole.
    """
    compute = torch.float64 if gates.dtype == torch.float64 else torch.float32
    total = gates.to(compute)
    if addend is not None:
        total = total + addend.to(compute)
    if bias is not None:
        total = total + bias.to(compute).view(1, -1, 1, 1)
    pre_i, pre_f, pre_o, pre_g = total.chunk(4, dim=1)
    c_prev = cell_prev.to(compute)
    w_i = w_f = w_o = c_prev.new_zeros(())
    if peephole is not None:
        w_i, w_f, w_o = peephole.to(compute).view(3, -1, 1, 1)
    i, f, g = torch.sigmoid(pre_i + w_i * c_prev), torch.sigmoid(pre_f + w_f * c_prev), torch.tanh(pre_g)
    c = f * c_prev + i * g
    o, tanh_c = torch.sigmoid(pre_o + w_o * c), torch.tanh(c)
    d_h = torch.zeros_like(c) if d_hidden is None else d_hidden.to(compute)
    d_c = torch.zeros_like(c) if d_cell is None else d_cell.to(compute)
    d_o = d_h * tanh_c * o * (1 - o)
    d_c = d_c + d_h * o * (1 - tanh_c * tanh_c) + d_o * w_o
    d_i, d_f = d_c * g * i * (1 - i), d_c * c_prev * f * (1 - f)
    d_g = d_c * i * (1 - g * g)
    d_c_prev = d_c * f + d_i * w_i + d_f * w_f
    d_gates = torch.cat([d_i, d_f, d_o, d_g], 1)
    d_bias, d_peephole = gates.new_empty(0), gates.new_empty(0)
    if bias is not None:
        d_bias = d_gates.sum((0, 2, 3)).to(bias.dtype)
    if peephole is not None:
        d_peephole = torch.cat([d_i * c_prev, d_f * c_prev, d_o * c], 1).sum((0, 2, 3)).to(peephole.dtype)
    dtype = gates.dtype if addend is None else torch.promote_types(gates.dtype, addend.dtype)
    return d_gates.to(dtype), d_c_prev.to(cell_prev.dtype), d_bias, d_peephole
