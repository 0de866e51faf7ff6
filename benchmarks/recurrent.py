"""ConvLSTM gates, cells and sequences: the inputs, those who take part, and when two of them agree.

T = steps, B = batch, Cin = input channels, C = hidden channels. Gates are in the order i, f, o, g.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import costs
import fastris
from fastris import reference
from peers import Peer

STEPS = 10
"""T of every sequence."""

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Largest error of a result or a gradient beside the fp64 reference, relative to the largest value of that tensor."""

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Problem:
    """What every peer of a case has to do: results of some tensors and, with ``backward``, the gradients of all.

    Attributes:
        tensors: the arguments by name, float32 and contiguous.
        d_results: gradients of the results, which backward starts from.
        backward: whether gradients are wanted.
        narrow: what is bfloat16 in the bfloat16 variant: names of arguments, and numbers of results.
    """

    tensors: Mapping[str, Tensor]
    d_results: Tensors
    backward: bool
    narrow: frozenset[str | int] = frozenset()
    _made: dict[Hashable, Any] = field(default_factory=dict)

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What ``make`` returned the first time: buffers and inputs in another form, made outside the timing."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def variant(self, dtype: torch.dtype, channels_last: bool) -> tuple[dict[str, Tensor], Tensors]:
        """The arguments and ``d_results`` in another dtype and layout."""
        return self.once((dtype, channels_last), lambda: self._variant(dtype, channels_last))

    def _variant(self, dtype: torch.dtype, channels_last: bool) -> tuple[dict[str, Tensor], Tensors]:
        def convert(name: str | int, tensor: Tensor) -> Tensor:
            wanted = torch.float32 if dtype == torch.bfloat16 and name not in self.narrow else dtype
            tensor = tensor.to(wanted)
            return in_channels_last(tensor) if channels_last else tensor.clone()

        arguments = {name: convert(name, tensor) for name, tensor in self.tensors.items()}
        for tensor in arguments.values():
            tensor.requires_grad_(self.backward)
        return arguments, tuple(convert(number, tensor) for number, tensor in enumerate(self.d_results))

    def run(
        self,
        function: Callable[..., Tensors],
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        autocast: bool = False,
    ) -> Tensors:
        """One call: the results and, with ``backward``, the gradients of all arguments in their order."""
        arguments, d_results = self.variant(dtype, channels_last)
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            if not self.backward:
                with torch.no_grad():
                    return function(**arguments)
            results = function(**arguments)
        seeds = [seed.to(result.dtype) for seed, result in zip(d_results, results, strict=True)]
        return (*results, *torch.autograd.grad(results, list(arguments.values()), seeds))


def in_channels_last(tensor: Tensor) -> Tensor:
    """(…, C, H, W) with the channels of a pixel side by side; a bias as it is. Always new memory."""
    if tensor.dim() < 4:
        return tensor.clone()
    return tensor.movedim(-3, -1).clone(memory_format=torch.contiguous_format).movedim(-1, -3)


def disagreement(found: Sequence[Tensor], truth: Mapping[str, Tensor], tolerance: float) -> str:
    """What differs from the truth, by name; empty where all agree."""
    if len(found) != len(truth):
        return f"{len(found)} results, not {len(truth)}"
    for value, (name, expected) in zip(found, truth.items(), strict=True):
        if value.shape != expected.shape:
            return f"{name} is of shape {tuple(value.shape)}, not {tuple(expected.shape)}"
        off = float((value.detach().double() - expected).abs().max() / expected.abs().max())
        if not off <= tolerance:  # nor is NaN
            return f"{name} is off by {off:.1e} of its largest value"
    return ""


def truth_of(problem: Problem, function: Callable[..., Tensors], results: Sequence[str]) -> dict[str, Tensor]:
    """The results and gradients of a reference in fp64, by name."""
    names = [*results, *(f"the gradient of {name}" for name in problem.tensors if problem.backward)]
    found = replace(problem, _made={}).run(function, torch.float64)
    return {name: value.detach() for name, value in zip(names, found, strict=True)}


def tolerance_of(peer: Peer) -> float:
    return TOLERANCE[torch.bfloat16 if "bf16" in peer.name else torch.float32]


# Inputs


def gates_problem(batch: int, channels: int, side: int, backward: bool) -> Problem:
    random = costs.generator("gates", batch, channels, side)
    state, gates = (batch, channels, side, side), (batch, 4 * channels, side, side)
    tensors = {
        "gates": torch.randn(gates, generator=random),
        "cell_prev": torch.randn(state, generator=random),
        "addend": torch.randn(gates, generator=random),
    }
    d_results = tuple(torch.randn(state, generator=random) for _ in range(2))
    return Problem(tensors, d_results, backward, frozenset({"gates", "addend", 0}))


def convlstm_problem(
    batch: int, inputs: int, channels: int, side: int, backward: bool, family: str | None = None
) -> Problem:
    """A layer of 3×3 convolutions: a sequence, ``constant`` or ``varying``, or one step where the family is None."""
    random = costs.generator("convlstm", batch, inputs, channels, side)
    lead = (STEPS,) if family == "varying" else ()
    state = (batch, channels, side, side)
    bound = (9 * (inputs + channels)) ** -0.5  # as nn.Conv2d starts
    tensors = {
        "x": torch.randn(*lead, batch, inputs, side, side, generator=random),
        "weight": bound * (2 * torch.rand(4 * channels, inputs + channels, 3, 3, generator=random) - 1),
        "bias": bound * (2 * torch.rand(4 * channels, generator=random) - 1),
    }
    if family is None:
        tensors["hidden"] = torch.rand(state, generator=random) - 0.5
        tensors["cell"] = torch.randn(state, generator=random)
    of_hidden = state if family is None else (STEPS, *state)
    d_results = (torch.randn(of_hidden, generator=random), torch.randn(state, generator=random))
    return Problem(tensors, d_results, backward)


# What people write


def eager_gates(gates: Tensor, cell_prev: Tensor, addend: Tensor) -> tuple[Tensor, Tensor]:
    i, f, o, g = torch.chunk(gates + addend, 4, 1)
    cell = torch.sigmoid(f) * cell_prev + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(cell), cell


def naive_cell(x: Tensor, weight: Tensor, bias: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """One convolution of [x, h], then the gates one by one, as in github.com/ndrplz/ConvLSTM_pytorch."""
    gates = F.conv2d(torch.cat([x, hidden], 1), weight, bias, padding=[1, 1])
    i, f, o, g = torch.chunk(gates, 4, 1)
    next_cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(next_cell), next_cell


def naive_sequence(x: Tensor, weight: Tensor, bias: Tensor, steps: int = STEPS) -> tuple[Tensor, Tensor]:
    hidden = torch.zeros_like(x if x.dim() == 4 else x[0])[:, :1].expand(-1, weight.shape[0] // 4, -1, -1)
    cell = hidden
    outputs = []
    for t in range(steps):
        hidden, cell = naive_cell(x if x.dim() == 4 else x[t], weight, bias, hidden, cell)
        outputs.append(hidden)
    return torch.stack(outputs), cell


def two_convolutions_cell(
    x: Tensor, weight: Tensor, bias: Tensor, hidden: Tensor, cell: Tensor
) -> tuple[Tensor, Tensor]:
    weight_x, weight_h = weight.split([x.shape[1], hidden.shape[1]], 1)
    return eager_gates(F.conv2d(x, weight_x, bias, padding=1), cell, F.conv2d(hidden, weight_h, padding=1))


def hoisted_sequence(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Conv(x) before the loop: once for a constant x, else all steps in one batch."""
    channels = weight.shape[0] // 4
    weight_x, weight_h = weight.split([weight.shape[1] - channels, channels], 1)
    if x.dim() == 4:
        of_x: Sequence[Tensor] = [F.conv2d(x, weight_x, bias, padding=1)] * STEPS
    else:
        of_x = F.conv2d(x.flatten(0, 1), weight_x, bias, padding=1).unflatten(0, x.shape[:2]).unbind(0)
    hidden = cell = x.new_zeros(x.shape[-4], channels, *x.shape[-2:])
    outputs = []
    for addend in of_x:
        hidden, cell = eager_gates(F.conv2d(hidden, weight_h, padding=1), cell, addend)
        outputs.append(hidden)
    return torch.stack(outputs), cell


# Peers: one input is (problem,); the answer is its results and gradients


def _peer(name: str, function: Callable[..., Tensors], **how: Any) -> Peer:
    version = fastris.__version__ if name.startswith("fastris") else torch.__version__
    return Peer(name, version, lambda problem: problem.run(function, **how))


class _Compiled:
    """A function under torch.compile, compiled by its first call alone."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.compiled: Callable[..., Any] | None = None

    def __call__(self, **tensors: Tensor) -> Any:
        if self.compiled is None:
            torch._dynamo.reset()  # nobody's graphs but those of this case, which count towards a limit
            self.compiled = torch.compile(self.function, dynamic=False, fullgraph=True)
        return self.compiled(**tensors)


def _compiled(function: Callable[..., Tensors]) -> Peer:
    peer = _peer("torch.compile", _Compiled(function))
    compiler = os.environ.get("CXX") or "g++"
    return peer if shutil.which(compiler.split()[0]) else replace(peer, missing=f"no C++ compiler {compiler}")


def _scripted(function: Callable[..., Tensors]) -> Peer:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is deprecated
            scripted = torch.jit.script(function)
    except Exception as error:  # not on every Python that torch runs on
        return Peer("TorchScript", torch.__version__, function, missing=f"{type(error).__name__}: {error}")

    def call(problem: Problem) -> Tensors:
        problem.once(scripted, lambda: problem.run(scripted) is None)  # profiles; the next call compiles
        return problem.run(scripted)

    return Peer("TorchScript", torch.__version__, call)


def gates_peers(compiled: bool) -> list[Peer]:
    """The public call and the operator that writes where it is told, in both layouts, and the floor."""
    nhwc = {"channels_last": True}
    found = [
        _peer("fastris", fastris.lstm_gates),
        _peer("fastris channels_last", fastris.lstm_gates, **nhwc),
        _peer("fastris bf16", fastris.lstm_gates, dtype=torch.bfloat16),
        Peer("fastris in place", fastris.__version__, partial(_gates_in_place, channels_last=False)),
        Peer("fastris in place channels_last", fastris.__version__, partial(_gates_in_place, channels_last=True)),
        Peer(FLOOR, torch.__version__, _copy_as_many_bytes),
        _peer("eager", eager_gates),
        _peer("eager channels_last", eager_gates, **nhwc),
    ]
    return [*found, _compiled(eager_gates)] if compiled else found


def _gates_in_place(problem: Problem, channels_last: bool) -> Tensors:
    """The operators of the sequence, into memory that is there."""
    arguments, (d_hidden, d_cell) = problem.variant(torch.float32, channels_last)
    gates, cell_prev, addend = arguments.values()

    def buffers() -> Tensors:
        return tuple(torch.zeros_like(one) for one in (d_hidden, d_cell, gates, cell_prev))

    hidden, cell, d_gates, d_cell_prev = problem.once(("in place", channels_last), buffers)
    with torch.no_grad():
        torch.ops.fastris.lstm_gates_out(gates, cell_prev, addend, None, None, hidden, cell)
        if not problem.backward:
            return hidden, cell
        torch.ops.fastris.lstm_gates_backward_out(
            gates, cell_prev, addend, None, None, d_hidden, d_cell, d_gates, d_cell_prev, None
        )
    return hidden, cell, d_gates, d_cell_prev, d_gates


FLOOR = "copy of as many bytes"
"""Reads and writes what the gates must at the least, half and half; in states of C channels forward reads 4 + 4 + 1 and
writes 2, and backward reads 4 + 4 + 1 + 1 + 1 and writes 4 + 1. What it writes to is there already."""


def _copy_as_many_bytes(problem: Problem) -> Tensors:
    def buffers() -> Tensors:
        state = problem.tensors["cell_prev"].numel()
        source = torch.rand((27 if problem.backward else 11) * state // 2)
        return source, torch.zeros_like(source)

    source, target = problem.once(FLOOR, buffers)
    return (target.copy_(source),)


def cell_peers(backward: bool, compiled: bool) -> list[Peer]:
    def step(
        x: Tensor, weight: Tensor, bias: Tensor, hidden: Tensor, cell: Tensor, memory: str = "balanced"
    ) -> Tensors:
        return fastris.convlstm(x, weight, bias, hidden, cell, 1, memory=memory)[1:]

    return [
        *_fastris_peers(step, backward),
        *_other_peers(naive_cell, compiled),
        _peer("eager, two convolutions", two_convolutions_cell),
    ]


def convlstm_peers(backward: bool, compiled: bool) -> list[Peer]:
    def sequence(x: Tensor, weight: Tensor, bias: Tensor, memory: str = "balanced") -> Tensors:
        outputs, _, cell = fastris.convlstm(x, weight, bias, steps=STEPS if x.dim() == 4 else None, memory=memory)
        return outputs, cell

    return [
        *_fastris_peers(sequence, backward),
        *_other_peers(naive_sequence, compiled),
        _peer("eager, Conv(x) hoisted", hoisted_sequence),
    ]


def _fastris_peers(function: Callable[..., Tensors], backward: bool) -> list[Peer]:
    """ "fastris" is memory="balanced", the default. Without backward the policies are the same."""
    policies = ("save", "recompute") if backward else ()
    return [
        _peer("fastris", function),
        *(_peer(f"fastris {memory}", partial(function, memory=memory)) for memory in policies),
        _peer("fastris bf16", function, autocast=True),
    ]


def _other_peers(naive: Callable[..., Tensors], compiled: bool) -> list[Peer]:
    return [
        _peer("naive", naive),
        _peer("naive channels_last", naive, channels_last=True),
        _peer("naive bf16", naive, autocast=True),
        *([_compiled(naive)] if compiled else []),
        _scripted(naive),
    ]


# The truth


def reference_cell(x: Tensor, weight: Tensor, bias: Tensor, hidden: Tensor, cell: Tensor) -> Tensors:
    return reference.convlstm(x, weight, bias, hidden, cell, 1)[1:]


def reference_sequence(x: Tensor, weight: Tensor, bias: Tensor) -> Tensors:
    outputs, _, cell = reference.convlstm(x, weight, bias, steps=STEPS if x.dim() == 4 else None)
    return outputs, cell
