"""The pointwise half of a ConvLSTM cell on the GPU, and its gradient; one pass over memory each.

B = batch, C = hidden channels, N = B·H·W pixels. Tensors are channels_last, so that they are rows of pixels: (N, 4C)
with the gates in the order i, f, o, g, and (N, C) for states.
"""

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # on a CPU, which has no PTX
NUM_WARPS = 4
MOST_CHANNELS = 64  # of a program


def tile_of(channels: int, itemsize: int) -> dict[str, int]:
    """Pixels and channels of a program: every thread takes 16 bytes of each gate, one 128-bit access where C allows."""
    block_c = min(triton.next_power_of_2(channels), MOST_CHANNELS)
    elements = NUM_WARPS * 32 * max(1, 16 // itemsize)
    return {"BLOCK_N": elements // block_c, "BLOCK_C": block_c}


@triton.jit
def reciprocal(x):
    """``1 / x`` for x from 1 to infinity, in fp32 by one instruction, to 1 ulp; a division takes eight, to 2 ulp."""
    if INTERPRETED or x.dtype == tl.float64:
        return 1 / x
    else:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def sigmoid(x):
    return reciprocal(1 + tl.exp(-x))


@triton.jit
def tanh(x):
    """Relative accuracy near 0, by an odd polynomial (fp64: Lambert's fraction), and no overflow far from it."""
    y = x * x
    if x.dtype == tl.float64:
        top = 34459425.0 + y * (4729725.0 + y * (135135.0 + y * (990.0 + y)))
        near = x * top / (34459425.0 + y * (16216200.0 + y * (945945.0 + y * (13860.0 + y * 45.0))))
    else:  # within 7e-8 of tanh, relatively
        near = x + x * y * (-0.33333319 + y * (0.13332602 + y * (-0.053853858 + y * (0.021077758 + y * -0.0062824725))))
    size = tl.abs(x)
    far = 1 - 2 * reciprocal(tl.exp(2 * size) + 1)
    return tl.where(size < 0.55, near, tl.where(x < 0, -far, far))


@triton.jit
def add_parts(
    value,  # [tile]
    addend,  # [N, 4C] from the tile's first pixel on, or None
    bias,  # [4C] or None
    at,  # offsets of gate i in addend
    used,
    c,
    GATE: tl.constexpr,
    C: tl.constexpr,
):
    """The pre-activation of a gate: ``value + addend + bias``."""
    if addend is not None:
        value += tl.load(addend + at + GATE * C, mask=used, other=0.0).to(value.dtype)
    if bias is not None:
        value += tl.load(bias + GATE * C + c, mask=c < C, other=0.0).to(value.dtype)[None, :]
    return value


@triton.jit
def peephole_of(peephole, c, like, GATE: tl.constexpr, C: tl.constexpr):
    """The weights [1, channels] of gate i, f or o."""
    return tl.load(peephole + GATE * C + c, mask=c < C, other=0.0).to(like.dtype)[None, :]


@triton.jit
def update(i, f, o, g, cell_prev, peephole, c, C: tl.constexpr):
    """``(i, f, o, g, cell, tanh(cell))`` of pre-activations; ``cell = f·cell_prev + i·g``."""
    if peephole is not None:
        i += peephole_of(peephole, c, i, 0, C) * cell_prev
        f += peephole_of(peephole, c, f, 1, C) * cell_prev
    i = sigmoid(i)
    f = sigmoid(f)
    g = tanh(g)
    cell = f * cell_prev + i * g
    if peephole is not None:
        o += peephole_of(peephole, c, o, 2, C) * cell
    return i, f, sigmoid(o), g, cell, tanh(cell)


@triton.jit
def gradients(i, f, o, g, cell_prev, d_hidden, d_cell, peephole, c, C: tl.constexpr):
    """Gradients ``(d_i, d_f, d_o, d_g, d_cell_prev)`` of pre-activations and of the previous cell."""
    i, f, o, g, cell, tanh_cell = update(i, f, o, g, cell_prev, peephole, c, C)
    d_o = d_hidden * tanh_cell * o * (1 - o)
    d_cell += d_hidden * o * (1 - tanh_cell * tanh_cell)
    if peephole is not None:
        d_cell += d_o * peephole_of(peephole, c, o, 2, C)
    d_i = d_cell * g * i * (1 - i)
    d_f = d_cell * cell_prev * f * (1 - f)
    d_g = d_cell * i * (1 - g * g)
    d_cell_prev = d_cell * f
    if peephole is not None:
        d_cell_prev += d_i * peephole_of(peephole, c, i, 0, C) + d_f * peephole_of(peephole, c, f, 1, C)
    return d_i, d_f, d_o, d_g, d_cell_prev


@triton.jit
def load_state(state, first, at, used, like, C: tl.constexpr):
    """A tile of a state (N, C), or zeros where there is none."""
    value = tl.zeros_like(like)
    if state is not None:
        value += tl.load(state + first * C + at, mask=used, other=0.0).to(like.dtype)
    return value


@triton.jit
def store_gradient(value, d_gates, d_sum, at, used, GATE: tl.constexpr, C: tl.constexpr):
    """Both pointers are those of the tile's first pixel."""
    tl.store(d_gates + at + GATE * C, value.to(d_gates.dtype.element_ty), mask=used)
    if d_sum is not None:
        here = d_sum + at + GATE * C
        total = tl.load(here, mask=used, other=0.0).to(value.dtype) + value
        tl.store(here, total.to(d_sum.dtype.element_ty), mask=used)


@triton.jit
def store_gradients(
    d_i, d_f, d_o, d_g, d_cell_prev_value, d_gates, d_cell_prev, d_sum, first, gate_at, at, used, C: tl.constexpr
):
    tl.debug_barrier()  # outputs may be inputs: all that the program reads is read by now
    d_gates += first * (4 * C)
    if d_sum is not None:
        d_sum += first * (4 * C)
    store_gradient(d_i, d_gates, d_sum, gate_at, used, 0, C)
    store_gradient(d_f, d_gates, d_sum, gate_at, used, 1, C)
    store_gradient(d_o, d_gates, d_sum, gate_at, used, 2, C)
    store_gradient(d_g, d_gates, d_sum, gate_at, used, 3, C)
    if d_cell_prev is not None:
        tl.store(d_cell_prev + first * C + at, d_cell_prev_value.to(d_cell_prev.dtype.element_ty), mask=used)


@triton.jit
def load_gate(gates, addend, bias, at, used, c, GATE: tl.constexpr, C: tl.constexpr):
    value = tl.load(gates + at + GATE * C, mask=used, other=0.0)
    if gates.dtype.element_ty != tl.float64:
        value = value.to(tl.float32)
    return add_parts(value, addend, bias, at, used, c, GATE, C)


@triton.jit
def load_gates(gates, addend, bias, first, at, used, c, C: tl.constexpr):
    """The four pre-activations of a tile."""
    gates += first * (4 * C)
    if addend is not None:
        addend += first * (4 * C)
    i = load_gate(gates, addend, bias, at, used, c, 0, C)
    f = load_gate(gates, addend, bias, at, used, c, 1, C)
    o = load_gate(gates, addend, bias, at, used, c, 2, C)
    g = load_gate(gates, addend, bias, at, used, c, 3, C)
    return i, f, o, g


@triton.jit
def lstm_gates_kernel(
    gates,  # [N, 4C]
    cell_prev,  # [N, C] or None
    addend,  # [N, 4C] or None
    bias,  # [4C] or None
    peephole,  # [3C] or None
    hidden,  # [N, C]
    cell,  # [N, C]
    N,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``cell = f·cell_prev + i·g`` and ``hidden = o·tanh(cell)`` of a tile of pixels and channels."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_N  # 64 bits here; within the tile 32 suffice
    n = tl.arange(0, BLOCK_N)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    used = (n < N - first)[:, None] & (c < C)[None, :]
    at = n[:, None] * C + c[None, :]
    i, f, o, g = load_gates(gates, addend, bias, first, n[:, None] * (4 * C) + c[None, :], used, c, C)
    previous = load_state(cell_prev, first, at, used, i, C)
    i, f, o, g, new, tanh_new = update(i, f, o, g, previous, peephole, c, C)
    tl.store(hidden + first * C + at, (o * tanh_new).to(hidden.dtype.element_ty), mask=used)
    tl.store(cell + first * C + at, new.to(cell.dtype.element_ty), mask=used)


@triton.jit
def lstm_gates_backward_kernel(
    gates,  # [N, 4C]
    cell_prev,  # [N, C] or None
    addend,  # [N, 4C] or None
    bias,  # [4C] or None
    peephole,  # [3C] or None
    d_hidden,  # [N, C] or None
    d_cell,  # [N, C] or None
    d_gates,  # [N, 4C], may be gates
    d_cell_prev,  # [N, C], may be d_cell, or None
    d_sum,  # [N, 4C] or None: d_gates is added to it
    N,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The gradients of a tile of pixels and channels, from activations that are computed again."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    n = tl.arange(0, BLOCK_N)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    used = (n < N - first)[:, None] & (c < C)[None, :]
    at = n[:, None] * C + c[None, :]
    gate_at = n[:, None] * (4 * C) + c[None, :]
    i, f, o, g = load_gates(gates, addend, bias, first, gate_at, used, c, C)
    previous = load_state(cell_prev, first, at, used, i, C)
    of_hidden = load_state(d_hidden, first, at, used, i, C)
    of_cell = load_state(d_cell, first, at, used, i, C)
    d_i, d_f, d_o, d_g, of_previous = gradients(i, f, o, g, previous, of_hidden, of_cell, peephole, c, C)
    store_gradients(d_i, d_f, d_o, d_g, of_previous, d_gates, d_cell_prev, d_sum, first, gate_at, at, used, C)
