"""A ConvLSTM step, convolution and gates in one kernel or in two, and whole sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastris
from fastris import reference
from gpu.gates import contiguous, eager, thnn
from gpu.harness import TOLERANCE, Absent, Harness, Peer, Row, compiled, off_by, ready

SIZES = {
    "B32 C64 128²": (32, 64, 128),
    "B32 C32 128²": (32, 32, 128),
    "B8 C64 64²": (8, 64, 64),
    "B8 C32 64²": (8, 32, 64),
}
TINY = {"B2 C8 8²": (2, 8, 8)}
UNFUSED = "cuDNN + gates"
STEPS = 10


def measure(harness: Harness) -> None:
    for size, shape in (TINY if harness.tiny else SIZES).items():
        for dtype in (torch.bfloat16, torch.float32):
            step(harness, size, shape, dtype)
    for size, shape in (TINY if harness.tiny else dict(list(SIZES.items())[::3])).items():
        for dtype in (torch.bfloat16, torch.float32):
            sequence(harness, size, shape, dtype)


def image(harness: Harness, batch: int, channels: int, side: int, dtype: torch.dtype) -> Tensor:
    made = torch.randn(batch, side, side, channels, device=harness.device).to(dtype)
    return made.permute(0, 3, 1, 2)


def step(harness: Harness, size: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """The recurrent half of a step beside a constant x; cell and addend in fp32, but for the peers that cannot."""
    batch, channels, side = shape
    torch.manual_seed(0)
    hidden_prev = image(harness, batch, channels, side, dtype)
    addend = image(harness, batch, 4 * channels, side, torch.float32)
    cell_prev = image(harness, batch, channels, side, torch.float32)
    weight = torch.randn(4 * channels, channels, 3, 3, device=harness.device).to(dtype) / (3 * channels**0.5)
    weight_last = weight.contiguous(memory_format=torch.channels_last)
    hidden, cell = torch.empty_like(hidden_prev), torch.empty_like(cell_prev)
    ends = [tensor[[0, -1]].double() for tensor in (hidden_prev, addend, cell_prev)]
    truth = reference.lstm_gates(F.conv2d(ends[0], weight.double(), padding=1), ends[2], ends[1])

    def check(found: Sequence[Tensor]) -> str:
        tolerance = max(TOLERANCE[dtype], 5e-3 if harness.cuda else 0.0)  # TF32 has ten bits
        return off_by([one[[0, -1]] for one in found], truth, tolerance)

    def convolved(x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(x, w, padding=1)

    def unfused() -> tuple[Tensor, Tensor]:
        gates = convolved(hidden_prev, weight_last).contiguous(memory_format=torch.channels_last)
        torch.ops.fastris.lstm_gates_out(gates, cell_prev, addend, None, None, hidden, cell)
        return hidden, cell

    def fused() -> Callable[[], tuple[Tensor, Tensor]]:
        if not harness.cuda:
            raise Absent("the fused step is a Triton kernel")
        from fastris.ops import convlstm_triton

        packed = convlstm_triton.pack_weight(weight)

        def call() -> tuple[Tensor, Tensor]:
            convlstm_triton.conv_gates_out(hidden_prev, packed, cell_prev, addend, None, None, 1, hidden, cell, None)
            return hidden, cell

        return call

    def with_thnn() -> Callable[[], Any]:
        narrow = addend.to(dtype)
        pointwise = thnn(narrow, narrow, cell_prev.to(dtype))  # its answer is another's

        def call() -> Any:
            convolved(hidden_prev, weight_last)
            pointwise()
            return hidden, cell

        unfused()
        return call

    def naive(x: Tensor, w: Tensor, add: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        return eager(convolved(x, w), add, before)

    first = [hidden_prev, weight_last, addend.to(dtype), cell_prev]
    nchw = contiguous(first)
    peers = {
        UNFUSED: ready(unfused),
        "cuDNN + _thnn_fused_lstm_cell": Peer(with_thnn),
        "eager": ready(lambda: naive(*nchw)),
        "eager channels_last": ready(lambda: naive(*first)),
        "torch.compile": compiled(harness, naive, first),
    }
    if side == 128 and dtype == torch.bfloat16:  # it tries convolutions for a minute
        peers["torch.compile max-autotune"] = compiled(harness, naive, first, "max-autotune-no-cudagraphs")

    def asked(row: Row) -> None:
        if dtype == torch.bfloat16:
            row.ahead_of(UNFUSED)

    floor = partial(harness.flop_floor, count=2 * 36 * channels * channels * batch * side * side, dtype=dtype)
    name = f"conv + gates {size} {str(dtype).removeprefix('torch.')}"
    with torch.no_grad():
        try:
            call: Callable[[], Any] = fused()
        except Absent:
            call = unfused
        harness.measure(name, call, check, peers, asked, floor)


def sequence(harness: Harness, size: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Ten steps of one image, forward and backward."""
    batch, channels, side = shape
    torch.manual_seed(0)
    x = image(harness, batch, channels, side, dtype)
    weight = torch.randn(4 * channels, 2 * channels, 3, 3, device=harness.device).to(dtype) / (4 * channels**0.5)
    bias = torch.zeros(4 * channels, device=harness.device, dtype=dtype)

    def naive(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        hidden = torch.zeros_like(x)
        cell = torch.zeros_like(x, dtype=torch.float32)
        outputs = []
        for _ in range(STEPS):
            i, f, o, g = F.conv2d(torch.cat([x, hidden], 1), weight, bias, padding=1).chunk(4, 1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            hidden = (o.sigmoid() * cell.tanh()).to(x.dtype)
            outputs.append(hidden)
        return torch.stack(outputs)

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fastris.convlstm(x, weight, bias, steps=STEPS)[0]

    def both_ways(function: Callable[..., Tensor], *tensors: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]

        def call() -> tuple[Tensor, ...]:
            outputs = function(*leaves)
            return (outputs.detach(), *torch.autograd.grad(outputs.float().square().sum(), leaves))

        return call

    truth = both_ways(naive, *(tensor[:1].double() for tensor in (x,)), weight.double(), bias.double())()

    def check(found: Sequence[Tensor]) -> str:
        """Of the first image; gradients of the weight are sums over all."""
        tolerance = 2 * max(TOLERANCE[dtype], 5e-3 if harness.cuda else 0.0)  # after ten steps
        return off_by([found[0][:, :1], found[1][:1]], [truth[0], truth[1]], tolerance)

    def of_compiled() -> Callable[[], Any]:
        if harness.tiny:
            raise Absent("no compilation in a rehearsal")
        torch._dynamo.reset()
        return both_ways(torch.compile(naive, dynamic=False), x, weight, bias)

    peers = {
        "naive": ready(both_ways(naive, x.contiguous(), weight, bias)),
        "naive channels_last": ready(both_ways(naive, x, weight.contiguous(memory_format=torch.channels_last), bias)),
        "torch.compile": Peer(of_compiled),
    }
    # The recurrent convolution nine times and that of x once, and twice as much backward.
    count = 3 * STEPS * 2 * 36 * channels * channels * batch * side * side
    floor = partial(harness.flop_floor, count=count, dtype=dtype)
    name = f"convlstm T10 forward+backward {size} {str(dtype).removeprefix('torch.')}"
    harness.measure(name, both_ways(ours, x, weight, bias), check, peers, floor=floor)
