"""The recurrent convolution of a ConvLSTM step and the gates behind it in one kernel, and the gates' gradient.

B = batch, C = hidden channels, K = C padded to a power of two, N = B·H·W pixels. Tensors are channels_last, so that
they are rows of pixels. Implicit GEMM: a program makes all four gates of BLOCK_N pixels × BLOCK_C channels.
"""

import triton
import triton.language as tl
from fastris.kernels.lstm_gates import add_parts, gradients, load_state, store_gradients, update

MOST_CHANNELS = 64
MOST_TAPS = 7  # along an axis

# At most 128 registers: two programs on a multiprocessor, one at its gates while the other multiplies.
OPTIONS = {"num_warps": 8, "maxnreg": 128}


def padded(channels: int) -> int:
    """K: a power of two, and 16, the least that ``tl.dot`` takes, at least."""
    return max(16, triton.next_power_of_2(channels))


def tile_of(channels: int, itemsize: int, precision: str, peephole: bool, backward: bool) -> dict[str, int]:
    """A program's pixels, channels and part of K, and its stages: the largest that spill no more than two registers."""
    block_c = 16 if backward or channels % 2 else min(padded(channels), 32)
    if itemsize == 4 and precision == "ieee":  # no tensor cores: the operands of the product are in registers
        return {"BLOCK_N": 64, "BLOCK_C": block_c, "BLOCK_K": 16, "num_stages": 2}
    roomy = itemsize == 2 and channels == padded(channels) and (backward or not peephole)
    block_k = min(padded(channels), 128 // itemsize)
    return {"BLOCK_N": 128 if roomy else 64, "BLOCK_C": block_c, "BLOCK_K": block_k, "num_stages": 3}


@triton.jit
def convolve(
    hidden_prev,  # [N, C]
    weight,  # [KH * KW, 4K, K], rows 4c + gate
    first,
    n,
    n_used,
    channel_block,
    H,
    W,
    KH,
    KW,
    dilation,
    C: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``conv2d_same(hidden_prev, weight)`` of the pixels from ``first`` on: i, f, o and g, [BLOCK_N, BLOCK_C] each.

    The number of taps is not a constant, or the compiler unrolls the loop, to 163 registers where 128 do.
    """
    pixel = (first % (H * W)).to(tl.int32) + n  # of its image, or of the next one
    y = pixel // W % H
    x = pixel % W
    k = tl.arange(0, BLOCK_K)
    column = channel_block * (4 * BLOCK_C) + tl.arange(0, 4 * BLOCK_C)
    hidden_at = n[:, None] * C + k[None, :]
    weight_at = k[:, None] + column[None, :] * K
    total = tl.zeros((BLOCK_N, 4 * BLOCK_C), tl.float32)
    for step in range(KH * KW * (K // BLOCK_K)):
        tap = step // (K // BLOCK_K)
        first_k = step % (K // BLOCK_K) * BLOCK_K
        dy = (tap // KW - KH // 2) * dilation
        dx = (tap % KW - KW // 2) * dilation
        inside = n_used & (y + dy >= 0) & (y + dy < H) & (x + dx >= 0) & (x + dx < W)
        here = hidden_prev + (first + dy.to(tl.int64) * W + dx) * C + first_k
        a = tl.load(here + hidden_at, mask=inside[:, None] & (k < C - first_k)[None, :], other=0.0)
        b = tl.load(weight + tap * (4 * K * K) + first_k + weight_at)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    i_and_o, f_and_g = tl.split(tl.reshape(total, (BLOCK_N, BLOCK_C, 2, 2)))
    i, o = tl.split(i_and_o)
    f, g = tl.split(f_and_g)
    return i, f, o, g


@triton.jit
def add_all_parts(i, f, o, g, addend, bias, first, at, used, c, C: tl.constexpr):
    if addend is not None:
        addend += first * (4 * C)
    i = add_parts(i, addend, bias, at, used, c, 0, C)
    f = add_parts(f, addend, bias, at, used, c, 1, C)
    o = add_parts(o, addend, bias, at, used, c, 2, C)
    g = add_parts(g, addend, bias, at, used, c, 3, C)
    return i, f, o, g


@triton.jit
def conv_gates_kernel(
    hidden_prev,  # [N, C]
    weight,  # [KH * KW, 4K, K]
    cell_prev,  # [N, C] or None
    addend,  # [N, 4C] or None
    bias,  # [4C] or None
    peephole,  # [3C] or None
    hidden,  # [N, C]
    cell,  # [N, C]
    gates,  # [N, 4C] or None: the convolution
    N,
    H,
    W,
    KH,
    KW,
    dilation,
    C: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One step: the convolution, then ``cell = f·cell_prev + i·g`` and ``hidden = o·tanh(cell)``."""
    channel_blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    first = (tl.program_id(0) // channel_blocks).to(tl.int64) * BLOCK_N  # 64 bits here; 32 suffice within the tile
    channel_block = tl.program_id(0) % channel_blocks
    n = tl.arange(0, BLOCK_N)
    n_used = n < N - first
    i, f, o, g = convolve(
        hidden_prev, weight, first, n, n_used, channel_block, H, W, KH, KW, dilation,
        C, K, BLOCK_N, BLOCK_C, BLOCK_K, PRECISION,
    )  # fmt: skip
    c = channel_block * BLOCK_C + tl.arange(0, BLOCK_C)
    used = n_used[:, None] & (c < C)[None, :]
    at = n[:, None] * C + c[None, :]
    gate_at = n[:, None] * (4 * C) + c[None, :]
    if gates is not None:
        gates += first * (4 * C)
        tl.store(gates + gate_at, i.to(gates.dtype.element_ty), mask=used)
        tl.store(gates + gate_at + C, f.to(gates.dtype.element_ty), mask=used)
        tl.store(gates + gate_at + 2 * C, o.to(gates.dtype.element_ty), mask=used)
        tl.store(gates + gate_at + 3 * C, g.to(gates.dtype.element_ty), mask=used)
    i, f, o, g = add_all_parts(i, f, o, g, addend, bias, first, gate_at, used, c, C)
    previous = load_state(cell_prev, first, at, used, i, C)
    i, f, o, g, new, tanh_new = update(i, f, o, g, previous, peephole, c, C)
    tl.store(hidden + first * C + at, (o * tanh_new).to(hidden.dtype.element_ty), mask=used)
    tl.store(cell + first * C + at, new.to(cell.dtype.element_ty), mask=used)


@triton.jit
def conv_gates_backward_kernel(
    hidden_prev,  # [N, C]
    weight,  # [KH * KW, 4K, K]
    cell_prev,  # [N, C] or None
    addend,  # [N, 4C] or None
    bias,  # [4C] or None
    peephole,  # [3C] or None
    d_hidden,  # [N, C] or None
    d_cell,  # [N, C] or None
    d_gates,  # [N, 4C]
    d_cell_prev,  # [N, C], may be d_cell, or None
    d_sum,  # [N, 4C] or None: d_gates is added to it
    N,
    H,
    W,
    KH,
    KW,
    dilation,
    C: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gates' gradients, from a convolution and activations that are computed again."""
    channel_blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    first = (tl.program_id(0) // channel_blocks).to(tl.int64) * BLOCK_N
    channel_block = tl.program_id(0) % channel_blocks
    n = tl.arange(0, BLOCK_N)
    n_used = n < N - first
    i, f, o, g = convolve(
        hidden_prev, weight, first, n, n_used, channel_block, H, W, KH, KW, dilation,
        C, K, BLOCK_N, BLOCK_C, BLOCK_K, PRECISION,
    )  # fmt: skip
    c = channel_block * BLOCK_C + tl.arange(0, BLOCK_C)
    used = n_used[:, None] & (c < C)[None, :]
    at = n[:, None] * C + c[None, :]
    gate_at = n[:, None] * (4 * C) + c[None, :]
    i, f, o, g = add_all_parts(i, f, o, g, addend, bias, first, gate_at, used, c, C)
    previous = load_state(cell_prev, first, at, used, i, C)
    of_hidden = load_state(d_hidden, first, at, used, i, C)
    of_cell = load_state(d_cell, first, at, used, i, C)
    d_i, d_f, d_o, d_g, of_previous = gradients(i, f, o, g, previous, of_hidden, of_cell, peephole, c, C)
    store_gradients(d_i, d_f, d_o, d_g, of_previous, d_gates, d_cell_prev, d_sum, first, gate_at, at, used, C)
