"""``lstm_gates``: the pointwise half of a ConvLSTM cell, ``torch.ops.fastris.lstm_gates``.

B = batch, C = hidden channels. Gates are in the order i, f, o, g.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastris import backend, reference
from fastris.ops.arguments import wrong
from fastris.ops.autograd import with_gradients
from fastris.reference.lstm_gates import lstm_gates_backward

# Schema. The gradients of a bias and of peepholes are empty where there are none. The `_out` operators write into
# memory that the caller has: they serve the sequence, which uses the same memory at every step. There cell_prev may be
# None (zeros), d_gates may be gates, d_cell_prev may be d_cell, and d_sum, in the dtype computed with, has d_gates
# added to it. All their tensors are dense and in one layout, bias and peephole in the dtype computed with, in which
# cell and addend may be beside half gates.

_library = torch.library.Library("fastris", "FRAGMENT")
_library.define(
    "lstm_gates(Tensor gates, Tensor cell_prev, Tensor? addend, Tensor? bias, Tensor? peephole)"
    " -> (Tensor hidden, Tensor cell)"
)
_library.define(
    "lstm_gates_backward(Tensor gates, Tensor cell_prev, Tensor? addend, Tensor? bias, Tensor? peephole,"
    " Tensor? d_hidden, Tensor? d_cell) -> (Tensor d_gates, Tensor d_cell_prev, Tensor d_bias, Tensor d_peephole)"
)
_library.define(
    "lstm_gates_out(Tensor gates, Tensor? cell_prev, Tensor? addend, Tensor? bias, Tensor? peephole,"
    " Tensor(a!) hidden, Tensor(b!) cell) -> ()"
)
_library.define(
    "lstm_gates_backward_out(Tensor gates, Tensor? cell_prev, Tensor? addend, Tensor? bias, Tensor? peephole,"
    " Tensor? d_hidden, Tensor? d_cell, Tensor(a!) d_gates, Tensor(b!)? d_cell_prev, Tensor(c!)? d_sum) -> ()"
)

# Kernels: csrc/cpu has the `_out` operators for the CPU, Triton for CUDA; elsewhere the reference runs


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the arithmetic of an operator on tensors of this dtype is done in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def layout_of(tensor: Tensor) -> torch.memory_format:
    """The layout that a kernel sees a (B, C, H, W) tensor in: CUDA's always channels_last, the CPU's also NCHW."""
    if tensor.is_cpu and (tensor.is_contiguous() or not tensor.is_contiguous(memory_format=torch.channels_last)):
        return torch.contiguous_format
    return torch.channels_last


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, which even for nothing takes as long as a small operator."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


class _Arguments:
    """The arguments of a call as the kernels want them: dense, in one layout, of few dtypes."""

    def __init__(
        self,
        gates: Tensor,
        cell_prev: Tensor,
        addend: Tensor | None,
        bias: Tensor | None,
        peephole: Tensor | None,
    ) -> None:
        self.layout = layout_of(gates)
        dtype = gates.dtype
        if addend is not None and addend.dtype is not dtype:
            dtype = torch.promote_types(dtype, addend.dtype)
        compute = compute_dtype(dtype)
        self.gates = self.dense(gates, dtype)
        self.cell_prev = self.dense(cell_prev, dtype if cell_prev.dtype == dtype else compute)
        self.addend = None if addend is None else self.dense(addend, dtype)
        self.bias = None if bias is None else bias.to(compute).contiguous()
        self.peephole = None if peephole is None else peephole.to(compute).contiguous()

    def dense(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return cast(tensor, dtype).contiguous(memory_format=self.layout)

    def inputs(self) -> tuple[Tensor | None, ...]:
        return self.gates, self.cell_prev, self.addend, self.bias, self.peephole

    def state(self, dtype: torch.dtype) -> Tensor:
        return torch.empty_like(self.cell_prev, dtype=dtype, memory_format=self.layout)


def _forward(
    gates: Tensor, cell_prev: Tensor, addend: Tensor | None, bias: Tensor | None, peephole: Tensor | None
) -> tuple[Tensor, Tensor]:
    if not backend.has_native("lstm_gates", gates.device.type):
        return reference.lstm_gates(gates, cell_prev, addend, bias, peephole)
    arguments = _Arguments(gates, cell_prev, addend, bias, peephole)
    hidden = arguments.state(arguments.gates.dtype)
    cell = arguments.state(arguments.cell_prev.dtype)
    torch.ops.fastris.lstm_gates_out.default(*arguments.inputs(), hidden, cell)
    return cast(hidden, gates.dtype), cast(cell, cell_prev.dtype)


def _backward(
    gates: Tensor,
    cell_prev: Tensor,
    addend: Tensor | None,
    bias: Tensor | None,
    peephole: Tensor | None,
    d_hidden: Tensor | None,
    d_cell: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not backend.has_native("lstm_gates", gates.device.type):
        return lstm_gates_backward(gates, cell_prev, addend, bias, peephole, d_hidden, d_cell)
    arguments = _Arguments(gates, cell_prev, addend, bias, peephole)
    if d_hidden is not None:
        d_hidden = arguments.dense(d_hidden, arguments.gates.dtype)
    if d_cell is not None:
        d_cell = arguments.dense(d_cell, arguments.cell_prev.dtype)
    d_gates = torch.empty_like(arguments.gates, memory_format=arguments.layout)
    d_cell_prev = arguments.state(arguments.cell_prev.dtype)
    compute = compute_dtype(d_gates.dtype)
    reduced = bias is not None or peephole is not None
    unrounded = None  # what the reductions are over
    if reduced and compute != d_gates.dtype:
        unrounded = torch.zeros_like(d_gates, dtype=compute, memory_format=arguments.layout)
    torch.ops.fastris.lstm_gates_backward_out.default(
        *arguments.inputs(), d_hidden, d_cell, d_gates, d_cell_prev, unrounded
    )
    unrounded = d_gates if unrounded is None else unrounded
    d_bias, d_peephole = gates.new_empty(0), gates.new_empty(0)
    if bias is not None:
        d_bias = unrounded.sum((0, 2, 3)).to(bias.dtype)
    if peephole is not None:
        arguments.cell_prev = arguments.cell_prev.to(compute)
        cell = arguments.state(compute)
        torch.ops.fastris.lstm_gates_out.default(*arguments.inputs(), arguments.state(arguments.gates.dtype), cell)
        d_peephole = peephole_gradient(unrounded, arguments.cell_prev, cell).to(peephole.dtype)
    return d_gates, cast(d_cell_prev, cell_prev.dtype), d_bias, d_peephole


def _cuda_out(*arguments: Any) -> None:
    from fastris.ops import lstm_gates_triton

    lstm_gates_triton.lstm_gates_out(*arguments)


def _cuda_backward_out(*arguments: Any) -> None:
    from fastris.ops import lstm_gates_triton

    lstm_gates_triton.lstm_gates_backward_out(*arguments)


_library.impl("lstm_gates", _forward, "CompositeExplicitAutograd")
_library.impl("lstm_gates_backward", _backward, "CompositeExplicitAutograd")
if backend.TRITON_FOUND:
    _library.impl("lstm_gates_out", _cuda_out, "CUDA")
    _library.impl("lstm_gates_backward_out", _cuda_backward_out, "CUDA")


def peephole_gradient(d_gates: Tensor, cell_prev: Tensor, cell: Tensor) -> Tensor:
    """(3C,) from the gradient of the pre-activations, (B, 4C, H, W), and the cells that i and f, and o, have seen."""
    parts = [d * seen for d, seen in zip(d_gates.chunk(4, 1), (cell_prev, cell_prev, cell), strict=False)]
    return torch.cat([part.sum((0, 2, 3)) for part in parts])


# Fake kernels


def _fake(
    gates: Tensor, cell_prev: Tensor, addend: Tensor | None, bias: Tensor | None, peephole: Tensor | None
) -> tuple[Tensor, Tensor]:
    layout = layout_of(gates)
    hidden = torch.empty_like(cell_prev, dtype=gates.dtype, memory_format=layout)
    return hidden, torch.empty_like(cell_prev, memory_format=layout)


def _fake_backward(
    gates: Tensor,
    cell_prev: Tensor,
    addend: Tensor | None,
    bias: Tensor | None,
    peephole: Tensor | None,
    d_hidden: Tensor | None,
    d_cell: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    layout = layout_of(gates)
    d_bias, d_peephole = (gates.new_empty(0) if one is None else torch.empty_like(one) for one in (bias, peephole))
    dtype = gates.dtype if addend is None else torch.promote_types(gates.dtype, addend.dtype)
    d_gates = torch.empty_like(gates, dtype=dtype, memory_format=layout)
    return d_gates, torch.empty_like(cell_prev, memory_format=layout), d_bias, d_peephole


def _fake_out(*arguments: Any) -> None:
    return None


torch.library.register_fake("fastris::lstm_gates_out", _fake_out, lib=_library)
torch.library.register_fake("fastris::lstm_gates_backward_out", _fake_out, lib=_library)
torch.library.register_fake("fastris::lstm_gates", _fake, lib=_library)
torch.library.register_fake("fastris::lstm_gates_backward", _fake_backward, lib=_library)

# Autograd


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, d_hidden: Tensor | None, d_cell: Tensor | None) -> tuple[Tensor | None, ...]:
    gates, _, addend, bias, peephole = ctx.saved_tensors
    d_gates, d_cell_prev, d_bias, d_peephole = _operator_backward(*ctx.saved_tensors, d_hidden, d_cell)
    d_addend = None if addend is None else cast(d_gates, addend.dtype)
    d_bias, d_peephole = None if bias is None else d_bias, None if peephole is None else d_peephole
    return cast(d_gates, gates.dtype), d_cell_prev, d_addend, d_bias, d_peephole


_operator, _operator_backward = with_gradients(
    _library, "lstm_gates", _gradients, _setup_context, (_forward, _backward)
)

# The door


def lstm_gates(
    gates: Tensor,
    cell_prev: Tensor,
    addend: Tensor | None = None,
    bias: Tensor | None = None,
    peephole: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One LSTM update; shapes, dtypes and source as in :func:`fastris.reference.lstm_gates`.

    NCHW and channels_last gates are taken as they are, and hidden and cell come in the same layout; on CUDA they are
    channels_last. The arithmetic is fp64 for fp64 and fp32 otherwise, under autocast too.

    Raises:
        TypeError: no tensors.
        ValueError: shapes, dtypes or devices that do not fit; the message names the argument.
    """
    if not isinstance(gates, Tensor) or gates.dim() != 4 or gates.shape[1] % 4 or not gates.is_floating_point():
        raise wrong("lstm_gates", "gates", "floating (B, 4C, H, W)", gates)
    batch, channels, height, width = gates.shape
    for name, value, shape in (
        ("cell_prev", cell_prev, (batch, channels // 4, height, width)),
        ("addend", addend, tuple(gates.shape)),
        ("bias", bias, (channels,)),
        ("peephole", peephole, (channels // 4 * 3,)),
    ):
        if value is None and name != "cell_prev":
            continue
        if not isinstance(value, Tensor) or tuple(value.shape) != shape or not value.is_floating_point():
            raise wrong("lstm_gates", name, f"floating {shape}", value)
        if value.device != gates.device:
            raise ValueError(f"lstm_gates: {name} must be on {gates.device} like gates, got {value.device}")
    if not backend.runs_native("lstm_gates", gates.device.type):
        return reference.lstm_gates(gates, cell_prev, addend, bias, peephole)
    hidden, cell = _operator(gates, cell_prev, addend, bias, peephole)
    return hidden, cell
