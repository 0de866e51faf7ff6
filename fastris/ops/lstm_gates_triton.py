"""Launches the Triton kernels of ``lstm_gates``; importing it imports Triton.

B = batch, C = hidden channels. Tensors of four dimensions are channels_last and dense, on one device. Gates are fp64,
fp32, bf16 or fp16; every other tensor may have a wider dtype than the gates. The arithmetic is fp64 for fp64 gates and
fp32 otherwise.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fastris.kernels import lstm_gates as kernels


def lstm_gates_out(
    gates: Tensor,
    cell_prev: Tensor | None,
    addend: Tensor | None,
    bias: Tensor | None,
    peephole: Tensor | None,
    hidden: Tensor,
    cell: Tensor,
) -> None:
    """:func:`fastris.reference.lstm_gates` into given tensors, without a host sync.

    Args:
        gates: (B, 4C, H, W).
        cell_prev: (B, C, H, W), or None for zeros.
        addend: (B, 4C, H, W) or None.
        bias: (4C,) or None.
        peephole: (3C,) or None.
        hidden, cell: (B, C, H, W) each, written.
    """
    if hidden.numel() == 0:
        return
    grid, pixels, constants = _tiles(gates)
    with torch.cuda.device_of(gates):
        kernels.lstm_gates_kernel[grid](gates, cell_prev, addend, bias, peephole, hidden, cell, pixels, **constants)


def lstm_gates_backward_out(
    gates: Tensor,
    cell_prev: Tensor | None,
    addend: Tensor | None,
    bias: Tensor | None,
    peephole: Tensor | None,
    d_hidden: Tensor | None,
    d_cell: Tensor | None,
    d_gates: Tensor,
    d_cell_prev: Tensor | None,
    d_sum: Tensor | None,
) -> None:
    """The gradient of :func:`lstm_gates_out` into given tensors, without a host sync.

    Args:
        gates, cell_prev, addend, bias, peephole: what the forward had.
        d_hidden, d_cell: (B, C, H, W) gradients of its results, or None for zeros.
        d_gates: (B, 4C, H, W), written: the gradient of the pre-activations, so of ``gates`` and of ``addend``. It may
            be ``gates`` itself. Those of bias and peephole are sums over it.
        d_cell_prev: (B, C, H, W), written, or None. It may be ``d_cell`` itself.
        d_sum: (B, 4C, H, W) or None: ``d_gates`` is added to it, before it is rounded.
    """
    if d_gates.numel() == 0:
        return
    grid, pixels, constants = _tiles(gates)
    with torch.cuda.device_of(gates):
        kernels.lstm_gates_backward_kernel[grid](
            gates, cell_prev, addend, bias, peephole, d_hidden, d_cell, d_gates, d_cell_prev, d_sum, pixels, **constants
        )


def _tiles(gates: Tensor) -> tuple[tuple[int, int], int, dict[str, int]]:
    """The grid, the number of pixels, and what the kernels are compiled for."""
    channels = gates.shape[1] // 4
    pixels = gates.numel() // gates.shape[1]
    tile = kernels.tile_of(channels, gates.element_size())
    grid = triton.cdiv(pixels, tile["BLOCK_N"]), triton.cdiv(channels, tile["BLOCK_C"])
    return grid, pixels, {"C": channels, **tile, "num_warps": kernels.NUM_WARPS}
