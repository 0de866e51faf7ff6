"""``convlstm``: a ConvLSTM layer over a whole sequence, ``torch.ops.fastris.convlstm``.

T = steps, B = batch, Cin = input channels, C = hidden channels.

A constant x goes through its half of the convolution once, in both directions, and a zero state through none. All is
computed in channels_last, in which the convolutions are fastest. Backward needs the pre-activations of every step:
``memory`` says of how many they are kept, those of the others are computed again.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastris import backend, reference
from fastris.ops.arguments import autocast_enabled, wrong
from fastris.ops.autograd import with_gradients
from fastris.ops.conv2d_same import SameConvolution, channels_last, empty_channels_last
from fastris.ops.lstm_gates import compute_dtype, peephole_gradient

RECOMPUTED = {"save": 0.0, "balanced": 0.4, "recompute": 1.0, "none": 1.0}
"""Share of the steps whose pre-activations are computed again. With "none" the cells go too: there is no backward."""

# Schema. For backward alone: cells are those of every step, and kept the pre-activations of the last steps, after the
# hoisted part where x is constant. The gradients asked for by `needed`, in the order x, weight, bias, hidden, cell,
# peephole; all others are empty.

_library = torch.library.Library("fastris", "FRAGMENT")
_library.define(
    "convlstm(Tensor x, Tensor weight, Tensor? bias, Tensor? hidden, Tensor? cell, Tensor? peephole, int steps,"
    " int dilation, str memory) -> (Tensor outputs, Tensor last_hidden, Tensor last_cell, Tensor cells, Tensor[] kept)"
)
_library.define(
    "convlstm_backward(Tensor x, Tensor weight, Tensor? bias, Tensor? hidden, Tensor? cell, Tensor? peephole,"
    " int steps, int dilation, Tensor outputs, Tensor cells, Tensor[] kept, Tensor? d_outputs, Tensor? d_hidden,"
    " Tensor? d_cell, bool[] needed) -> Tensor[]"
)


class _Layer:
    """The layer of one call, forward or backward."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        hidden: Tensor | None,
        cell: Tensor | None,
        peephole: Tensor | None,
        steps: int,
        dilation: int,
        *,
        fused: bool,
    ) -> None:
        self.constant = x.dim() == 4
        self.steps, self.dilation = steps, dilation
        self.channels, self.inputs = weight.shape[0] // 4, x.shape[-3]
        self.batch, self.height, self.width = x.shape[-4], *x.shape[-2:]
        self.x = channels_last(x) if self.constant else x
        self.weight = weight
        self.of_both = SameConvolution(weight, dilation)
        weight_x, weight_h = weight.split([self.inputs, self.channels], 1)
        self.of_x = SameConvolution(weight_x, dilation, largest=2)  # once a sequence: the digits cost no time
        self.of_h = SameConvolution(weight_h, dilation)
        self.bias = bias
        self.hidden = None if hidden is None else channels_last(hidden)
        self.cell = None if cell is None else channels_last(cell)
        self.peephole = None if peephole is None else peephole.to(compute_dtype(x.dtype)).contiguous()
        self.cell_dtype = cell.dtype if cell is not None else torch.promote_types(x.dtype, torch.float32)
        self._hoisted: Tensor | None = None
        self.fused = fused_step(self.of_h.weight) if fused and self.constant else None

    @cached_property
    def packed(self) -> Tensor:
        """The recurrent weight as the fused step reads it."""
        assert self.fused is not None
        return self.fused.pack_weight(self.of_h.weight)

    @property
    def hoisted(self) -> Tensor:
        """The part of the pre-activations that is the same at every step of a constant x, in the dtype computed with:
        rounded to half, it would have the same error at all of them."""
        if self._hoisted is None:
            dtype = compute_dtype(self.x.dtype)
            convolution = SameConvolution(self.of_x.weight.to(dtype), self.dilation, largest=2)
            self._hoisted = convolution.forward(self.x.to(dtype), None if self.bias is None else self.bias.to(dtype))
        return self._hoisted

    def kept_steps(self, memory: str) -> range:
        """The steps whose pre-activations are kept. What step 0 of a constant x computes is the hoisted part itself."""
        first = int(self.constant and self.hidden is None)
        recomputed = round((self.steps - first) * RECOMPUTED[memory])
        return range(min(first + recomputed, self.steps), self.steps)

    def moving(self, t: int, previous: Tensor | None) -> Tensor | None:
        """What is convolved at step t: [x_t, h], or h alone beside a constant x, or nothing."""
        if self.constant:
            return previous
        x = channels_last(self.x[t])
        return x if previous is None else channels_last(torch.cat([x, previous], 1))

    def gates(self, t: int, previous: Tensor | None, room: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Pre-activations of a step in two addends, the second one hoisted."""
        moving = self.moving(t, previous)
        if moving is None:
            if self.hoisted.dtype == self.x.dtype:
                return self.hoisted, None
            return (empty_channels_last(self.x, 4 * self.channels) if room is None else room).zero_(), self.hoisted
        if self.constant:
            return self.of_h.forward(moving, None, room), self.hoisted
        return (self.of_x if previous is None else self.of_both).forward(moving, self.bias, room), None

    def states(self, dtype: torch.dtype, count: int) -> Tensor:
        """Room for (count, B, C, H, W), each channels_last."""
        shape = (count, self.batch, self.height, self.width, self.channels)
        return self.x.new_empty(shape, dtype=dtype).permute(0, 1, 4, 2, 3)

    def step(
        self,
        t: int,
        hidden: Tensor | None,
        cell: Tensor | None,
        next_hidden: Tensor,
        next_cell: Tensor,
        keep: bool,
    ) -> Tensor | None:
        """Write the next state, and give the pre-activations, which a fused step has only if it is to keep them."""
        if self.fused is not None and hidden is not None:
            gates = torch.empty_like(self.hoisted, dtype=self.x.dtype) if keep else None
            self.fused.conv_gates_out(
                hidden,
                self.packed,
                cell,
                self.hoisted,
                None,
                self.peephole,
                self.dilation,
                next_hidden,
                next_cell,
                gates,
            )
            return gates
        gates, addend = self.gates(t, hidden)
        torch.ops.fastris.lstm_gates_out.default(gates, cell, addend, None, self.peephole, next_hidden, next_cell)
        return gates

    def step_backward(
        self,
        t: int,
        hidden: Tensor | None,
        cell: Tensor | None,
        gates: Tensor | None,
        d_hidden: Tensor | None,
        d_cell: Tensor,
        d_gates: Tensor,
        d_sum: Tensor | None,
    ) -> Tensor:
        """The gradient of the pre-activations, which are computed again where they were not kept.

        It is ``d_gates`` or memory of its own, and ``d_cell`` becomes the next step's.
        """
        if gates is not None:
            addend = self.hoisted if self.constant else None
        elif self.fused is not None and hidden is not None:
            self.fused.conv_gates_backward_out(
                hidden, self.packed, cell, self.hoisted, None, self.peephole, self.dilation,
                d_hidden, d_cell, d_gates, d_cell, d_sum,
            )  # fmt: skip
            return d_gates
        else:
            gates, addend = self.gates(t, hidden, d_gates)
            d_gates = d_gates if gates is self._hoisted else gates
        torch.ops.fastris.lstm_gates_backward_out.default(
            gates, cell, addend, None, self.peephole, d_hidden, d_cell, d_gates, d_cell, d_sum
        )
        return d_gates

    def forward(self, memory: str) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
        outputs = self.states(self.x.dtype, self.steps)
        cells = self.states(self.cell_dtype, 2 if memory == "none" else self.steps)
        kept_steps = self.kept_steps(memory)
        kept = [self.hoisted] if self.constant and memory != "none" else []
        hidden, cell = self.hidden, self.cell
        for t in range(self.steps):
            next_hidden, next_cell = outputs[t], cells[t % len(cells)]
            gates = self.step(t, hidden, cell, next_hidden, next_cell, t in kept_steps)
            hidden, cell = next_hidden, next_cell
            if t in kept_steps:
                assert gates is not None
                kept.append(gates)
        if hidden is None or cell is None or self.steps == 0:  # nothing has moved
            hidden = self.states(self.x.dtype, 1)[0].zero_() if hidden is None else hidden
            cell = self.states(self.cell_dtype, 1)[0].zero_() if cell is None else cell
        return outputs, hidden.clone(), cell.clone(), cells[:0] if memory == "none" else cells, kept

    def backward(
        self,
        outputs: Tensor,
        cells: Tensor,
        kept: list[Tensor],
        d_outputs: Tensor | None,
        d_hidden: Tensor | None,
        d_cell: Tensor | None,
        needed: list[bool],
    ) -> list[Tensor]:
        need_x, need_weight, need_bias, need_hidden, need_cell, need_peephole = needed
        if self.constant:
            self._hoisted, *kept = kept
        compute = compute_dtype(self.x.dtype)
        x_and_h = [self.inputs, self.channels]
        d_weight = torch.zeros_like(self.weight, dtype=compute)
        d_weight_x, d_weight_h = d_weight.split(x_and_h, 1)
        d_peephole = self.x.new_zeros(3 * self.channels, dtype=compute)
        d_bias = self.x.new_zeros(4 * self.channels, dtype=compute)
        d_x = torch.empty_like(self.x) if need_x and not self.constant else self.x.new_empty(0)
        room = empty_channels_last(self.x if self.constant else self.x[0], 4 * self.channels) if self.steps else d_x
        d_sum = torch.zeros_like(self.hoisted, dtype=compute) if self.constant else None
        d_h = None if d_hidden is None else channels_last(d_hidden).clone()
        d_c = None if d_cell is None else channels_last(d_cell).clone()
        for t in reversed(range(self.steps)):
            before = (outputs[t - 1], cells[t - 1]) if t else (self.hidden, self.cell)
            age = self.steps - 1 - t
            if d_outputs is not None:
                d_h = channels_last(d_outputs[t]).clone() if d_h is None else d_h.add_(d_outputs[t])
            if d_c is None:
                d_c = torch.zeros_like(cells[t])
            gates = kept[-1 - age] if age < len(kept) else None
            d_gates = self.step_backward(t, *before, gates, d_h, d_c, room, d_sum)
            if need_peephole:
                cell_before = torch.zeros_like(cells[t]) if before[1] is None else before[1]
                d_peephole += peephole_gradient(d_gates.to(compute), cell_before, cells[t])
            d_h = None
            moving = self.moving(t, before[0])
            if moving is not None:
                convolution = self.of_h if self.constant else self.of_both if before[0] is not None else self.of_x
                wanted = t > 0 or need_hidden or (need_x and not self.constant), need_weight
                d_moving, d_moving_weight = convolution.backward(d_gates, moving, *wanted)
                if need_weight:
                    into = d_weight_h if self.constant else d_weight if before[0] is not None else d_weight_x
                    into += d_moving_weight
                if not self.constant:
                    if need_x:
                        d_x[t] = d_moving[:, : self.inputs]
                    if before[0] is not None and wanted[0]:
                        d_h = channels_last(d_moving[:, self.inputs :])
                    if need_bias:
                        d_bias += d_gates.sum((0, 2, 3), dtype=compute)
                elif wanted[0]:
                    d_h = d_moving
        if d_sum is not None:
            d_x, d_weight_once = self.of_x.backward(d_sum.to(self.x.dtype), self.x, need_x, need_weight)
            if need_weight:
                d_weight_x += d_weight_once
            d_bias = d_sum.sum((0, 2, 3))
        if d_h is None and need_hidden and self.hidden is not None:  # of no steps, when only the cell was used
            d_h = torch.zeros_like(self.hidden)
        if d_c is None and need_cell and self.cell is not None:
            d_c = torch.zeros_like(self.cell)
        found = [d_x, d_weight, d_bias, d_h, d_c, d_peephole]
        like = [self.x, self.weight, self.bias, self.hidden, self.cell, self.peephole]
        return [
            grad.to(one.dtype) if wanted and grad is not None and one is not None else self.x.new_empty(0)
            for grad, one, wanted in zip(found, like, needed, strict=True)
        ]


def fused_step(weight: Tensor) -> ModuleType | None:
    """The Triton kernels that convolve and update in one, beside a constant x: on CUDA, in bf16 and fp16, and what
    :func:`fastris.ops.convlstm_triton.supports`. In fp32 cuDNN's convolution should be ahead."""
    if weight.device.type != "cuda" or weight.dtype not in (torch.bfloat16, torch.float16):
        return None
    from fastris.ops import convlstm_triton

    return convlstm_triton if convlstm_triton.supports(weight) else None


def no_autocast(device_type: str) -> AbstractContextManager[object]:
    """A context without autocast."""
    return torch.autocast(device_type, enabled=False) if autocast_enabled(device_type) else nullcontext()


# Kernels: the layer in Python over the convolutions of torch and the native gates, on the devices that have those


def _native(*arguments: Any, fused: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    *layer, memory = arguments
    with no_autocast(layer[0].device.type):
        return _Layer(*layer, fused=fused).forward(memory)


def _native_backward(*arguments: Any, fused: bool = True) -> list[Tensor]:
    layer, results = arguments[:8], arguments[8:]
    with no_autocast(layer[0].device.type):
        return _Layer(*layer, fused=fused).backward(*results)


for device in ("CPU", "CUDA"):
    if backend.has_native("convlstm", device.lower()):
        _library.impl("convlstm", _native, device)
        _library.impl("convlstm_backward", _native_backward, device)

# Fake kernels: the same, but for the fused step, which is no operator


def _fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    return _native(*arguments, fused=False)


def _fake_backward(*arguments: Any) -> list[Tensor]:
    return _native_backward(*arguments, fused=False)


torch.library.register_fake("fastris::convlstm", _fake, lib=_library)
torch.library.register_fake("fastris::convlstm_backward", _fake_backward, lib=_library)

# Autograd


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    tensors, (ctx.steps, ctx.dilation, ctx.memory) = inputs[:6], inputs[6:]
    outputs, _, _, cells, kept = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(cells, *kept)
    ctx.save_for_backward(*tensors, outputs, cells, *kept)


def _gradients(
    ctx: Any, d_outputs: Tensor | None, d_hidden: Tensor | None, d_cell: Tensor | None, *unused: Any
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    if ctx.memory == "none":
        raise RuntimeError("convlstm: with memory 'none' nothing is kept for backward")
    tensors, outputs, cells, kept = saved[:6], saved[6], saved[7], list(saved[8:])
    needed = list(ctx.needs_input_grad[:6])
    found = torch.ops.fastris.convlstm_backward(
        *tensors, ctx.steps, ctx.dilation, outputs, cells, kept, d_outputs, d_hidden, d_cell, needed
    )
    return (*(grad if wanted else None for grad, wanted in zip(found, needed, strict=True)), None, None, None)


with_gradients(_library, "convlstm", _gradients, _setup_context)

# The door


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
    memory: str = "balanced",
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a ConvLSTM layer; shapes, dtypes and results as in :func:`fastris.reference.convlstm`.

    The results are channels_last. Under autocast all but the cell is cast to the autocast dtype.

    Args:
        memory: what backward needs is kept ("save"), or computed again to save memory, for the first two fifths of
            the steps ("balanced") or for all ("recompute"), which takes one more convolution for each.

    Raises:
        TypeError: no tensors.
        ValueError: shapes, dtypes or devices that do not fit, or an unknown ``memory``; the message names the argument.
    """
    if not isinstance(x, Tensor) or x.dim() not in (4, 5) or not x.is_floating_point():
        raise wrong("convlstm", "x", "floating (T, B, Cin, H, W) or (B, Cin, H, W)", x)
    if not isinstance(weight, Tensor) or weight.dim() != 4 or weight.shape[0] % 4 or 0 in weight.shape[2:]:
        raise wrong("convlstm", "weight", "(4C, Cin + C, kh, kw)", weight)
    if (x.dim() == 4) != (steps is not None):
        raise ValueError("convlstm: steps goes with a constant x of shape (B, Cin, H, W), and is needed there")
    if steps is not None and (not isinstance(steps, int) or steps < 0):
        raise ValueError(f"convlstm: steps must be an integer from 0, got {steps!r}")
    if not isinstance(dilation, int) or dilation < 1:
        raise ValueError(f"convlstm: dilation must be an integer from 1, got {dilation!r}")
    if memory not in ("save", "balanced", "recompute"):
        raise ValueError(f"convlstm: memory must be 'save', 'balanced' or 'recompute', got {memory!r}")
    channels = weight.shape[0] // 4
    if weight.shape[1] != x.shape[-3] + channels:
        raise ValueError(
            f"convlstm: weight must have {x.shape[-3]} + {channels} input channels for this x, got {weight.shape[1]}"
        )
    state = (x.shape[-4], channels, *x.shape[-2:])
    optional = {"bias": (4 * channels,), "hidden": state, "cell": state, "peephole": (3 * channels,)}
    given = {"weight": weight, "bias": bias, "hidden": hidden, "cell": cell, "peephole": peephole}
    for name, value in given.items():
        if value is None:
            continue
        if not isinstance(value, Tensor) or (name in optional and tuple(value.shape) != optional[name]):
            raise wrong("convlstm", name, f"{optional.get(name)}", value)
        if value.device != x.device:
            raise ValueError(f"convlstm: {name} must be on {x.device} like x, got {value.device}")
    device = x.device.type
    if autocast_enabled(device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
        bias, hidden = (None if one is None else one.to(dtype) for one in (bias, hidden))
    for name, value in (("weight", weight), ("bias", bias), ("hidden", hidden)):
        if value is not None and value.dtype != x.dtype:
            raise ValueError(f"convlstm: {name} must be {x.dtype} like x, got {value.dtype}")
    if cell is not None and cell.dtype not in (x.dtype, torch.promote_types(x.dtype, torch.float32)):
        raise ValueError(f"convlstm: cell must be {x.dtype} like x or float32, got {cell.dtype}")
    if not backend.runs_native("convlstm", device):
        with no_autocast(device):
            return reference.convlstm(x, weight, bias, hidden, cell, steps, peephole=peephole, dilation=dilation)
    differentiated = torch.is_grad_enabled() and any(
        one is not None and one.requires_grad for one in (x, weight, bias, hidden, cell, peephole)
    )
    outputs, last_hidden, last_cell, _, _ = torch.ops.fastris.convlstm(
        x,
        weight,
        bias,
        hidden,
        cell,
        peephole,
        x.shape[0] if steps is None else steps,
        dilation,
        memory if differentiated else "none",
    )
    return outputs, last_hidden, last_cell
