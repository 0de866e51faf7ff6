"""Launches the Triton kernels of a ConvLSTM step; importing it imports Triton.

B = batch, C = hidden channels, K = C padded to a power of two. Tensors of four dimensions are channels_last and dense,
on one device. Hidden states, weights and gates are fp32, bf16 or fp16, and have one dtype; cell states, bias,
peepholes, gradients of cell states and sums may be fp32 beside bf16 or fp16. The arithmetic is fp32; fp32 is multiplied
as TF32 where cuDNN's convolutions do so, as ``torch.backends.cudnn.allow_tf32`` has it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from fastris.kernels import convlstm as kernels


def supports(weight: Tensor) -> bool:
    """Whether a step of this recurrent ``weight`` can be one kernel.

    It can with at most 64 hidden channels, odd kernels up to 7×7, any dilation, and fp32, bf16 or fp16 throughout.
    More channels do not pay: cuDNN's convolution and :func:`fastris.ops.lstm_gates_triton.lstm_gates_out` are faster.

    Args:
        weight: (4C, C, kh, kw), the part of the layer's weight that the hidden state meets.
    """
    channels = weight.shape[1]
    return (
        weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and weight.shape[0] == 4 * channels
        and channels <= kernels.MOST_CHANNELS
        and all(size % 2 == 1 and size <= kernels.MOST_TAPS for size in weight.shape[2:])
    )


def pack_weight(weight: Tensor) -> Tensor:
    """The recurrent weight as the kernels read it: (kh, kw, 4K, K) of (4C, C, kh, kw), rows 4c + gate, zero-padded.

    Once per sequence is enough. Tensor cores want inputs next to each other for TF32, and take them so for the rest.
    """
    channels, height, width = weight.shape[1:]
    pad = kernels.padded(channels) - channels
    by_gate = weight.view(4, channels, channels, height, width).permute(3, 4, 1, 0, 2)  # kh, kw, output, gate, input
    return F.pad(by_gate, (0, pad, 0, 0, 0, pad)).reshape(height, width, -1, channels + pad).contiguous()


def conv_gates_out(
    hidden_prev: Tensor,
    packed: Tensor,
    cell_prev: Tensor | None,
    addend: Tensor | None,
    bias: Tensor | None,
    peephole: Tensor | None,
    dilation: int,
    hidden: Tensor,
    cell: Tensor,
    gates: Tensor | None,
) -> None:
    """One step into given tensors: the "same" convolution of the hidden state, then the gates; without a host sync.

    Args:
        hidden_prev: (B, C, H, W).
        packed: (kh, kw, 4K, K), see :func:`pack_weight`.
        cell_prev: (B, C, H, W), or None for zeros.
        addend: (B, 4C, H, W) or None, the input's part of the pre-activations.
        bias: (4C,) or None.
        peephole: (3C,) or None.
        dilation: pixels between the taps of the kernel.
        hidden, cell: (B, C, H, W) each, written. Neither may be ``hidden_prev``, which other programs still read.
        gates: (B, 4C, H, W), written, or None: the convolution alone, what the gates' backward takes as ``gates``.
    """
    if hidden.numel() == 0:
        return
    grid, sizes, constants = _tiles(hidden_prev, packed, dilation, peephole is not None, backward=False)
    with torch.cuda.device_of(hidden_prev):
        kernels.conv_gates_kernel[grid](
            hidden_prev, packed, cell_prev, addend, bias, peephole, hidden, cell, gates, *sizes, **constants
        )


def conv_gates_backward_out(
    hidden_prev: Tensor,
    packed: Tensor,
    cell_prev: Tensor | None,
    addend: Tensor | None,
    bias: Tensor | None,
    peephole: Tensor | None,
    dilation: int,
    d_hidden: Tensor | None,
    d_cell: Tensor | None,
    d_gates: Tensor,
    d_cell_prev: Tensor | None,
    d_sum: Tensor | None,
) -> None:
    """The gates' gradient where the forward kept no ``gates``: the convolution is computed again.

    The convolution's own gradients, of ``hidden_prev`` and of the weight, follow from ``d_gates``.

    Args:
        hidden_prev, packed, cell_prev, addend, bias, peephole, dilation: what the forward had.
        d_hidden, d_cell: (B, C, H, W) gradients of its results, or None for zeros.
        d_gates: (B, 4C, H, W), written: the gradient of the pre-activations.
        d_cell_prev: (B, C, H, W), written, or None. It may be ``d_cell`` itself.
        d_sum: (B, 4C, H, W) or None: ``d_gates`` is added to it, before it is rounded.
    """
    if d_gates.numel() == 0:
        return
    grid, sizes, constants = _tiles(hidden_prev, packed, dilation, peephole is not None, backward=True)
    with torch.cuda.device_of(hidden_prev):
        kernels.conv_gates_backward_kernel[grid](
            hidden_prev, packed, cell_prev, addend, bias, peephole,
            d_hidden, d_cell, d_gates, d_cell_prev, d_sum, *sizes, **constants,
        )  # fmt: skip


def _tiles(
    hidden: Tensor, packed: Tensor, dilation: int, peephole: bool, backward: bool
) -> tuple[tuple[int], tuple[int, ...], dict[str, int | str]]:
    """The grid, the sizes that the kernels take as arguments, and what they are compiled for."""
    batch, channels, height, width = hidden.shape
    padded = kernels.padded(channels)
    if packed.dim() != 4 or tuple(packed.shape[2:]) != (4 * padded, padded):
        raise ValueError(f"conv_gates: packed must be (kh, kw, {4 * padded}, {padded}), got {tuple(packed.shape)}")
    pixels = batch * height * width
    # Not allow_tf32: reading that is an error once the newer setting, which it also changes, has been used.
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    tf32 = hidden.dtype == torch.float32 and convolutions.fp32_precision == "tf32"
    precision = "tf32" if tf32 else "ieee"
    tile = kernels.tile_of(channels, hidden.element_size(), precision, peephole, backward)
    grid = (triton.cdiv(pixels, tile["BLOCK_N"]) * triton.cdiv(channels, tile["BLOCK_C"]),)
    sizes = pixels, height, width, packed.shape[0], packed.shape[1], dilation
    return grid, sizes, {"C": channels, "K": padded, "PRECISION": precision, **tile, **kernels.OPTIONS}
