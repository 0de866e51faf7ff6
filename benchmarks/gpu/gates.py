"""``lstm_gates``, forward and backward: as fast as a copy of as many bytes?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastris.reference import lstm_gates
from gpu.harness import TOLERANCE, Absent, Harness, Peer, Row, compiled, off_by, ready

SIZES = {"B32 C64 128²": (32, 64, 128), "B8 C32 64²": (8, 32, 64)}
TINY = {"B2 C8 8²": (2, 8, 8)}


def eager(gates: Tensor, addend: Tensor, cell_prev: Tensor) -> tuple[Tensor, Tensor]:
    i, f, o, g = (gates + addend).chunk(4, 1)
    cell = f.sigmoid() * cell_prev + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


def thnn(gates: Tensor, addend: Tensor, cell_prev: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """torch's fused cell on rows of pixels, with gates in its own order, i, f, g, o."""
    if not gates.is_cuda:
        raise Absent("_thnn_fused_lstm_cell is for CUDA alone")

    def rows(tensor: Tensor) -> Tensor:
        return tensor.permute(0, 2, 3, 1).reshape(-1, tensor.shape[1])

    def reordered(tensor: Tensor) -> Tensor:
        i, f, o, g = rows(tensor).chunk(4, 1)
        return torch.cat([i, f, g, o], 1)

    first, second, cell = reordered(gates), reordered(addend), rows(cell_prev).contiguous()
    batch, channels, height, width = cell_prev.shape

    def image(tensor: Tensor) -> Tensor:
        return tensor.view(batch, height, width, channels).permute(0, 3, 1, 2)

    def call() -> tuple[Tensor, ...]:
        hidden, new, _ = torch.ops.aten._thnn_fused_lstm_cell(first, second, cell)
        return image(hidden), image(new)

    return call


def measure(harness: Harness) -> None:
    for size, shape in (TINY if harness.tiny else SIZES).items():
        for dtype in (torch.bfloat16, torch.float32):
            forward(harness, size, shape, dtype)
            backward(harness, size, shape, dtype)


def inputs(harness: Harness, shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Gates, addend and cell, and gradients of hidden and cell; channels_last."""
    batch, channels, side = shape
    torch.manual_seed(0)

    def tensor(count: int) -> Tensor:
        made = torch.randn(batch, side, side, count, device=harness.device).to(dtype)
        return made.permute(0, 3, 1, 2)

    return [tensor(4 * channels), tensor(4 * channels), tensor(channels)], [tensor(channels), tensor(channels)]


def contiguous(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.contiguous() for tensor in tensors]


def name_of(size: str, dtype: torch.dtype, what: str) -> str:
    return f"lstm_gates {what} {size} {str(dtype).removeprefix('torch.')}"


def asked(row: Row) -> None:
    if "128²" in row.kernel:
        row.within_floor(0.85)


def part_of(image: Tensor) -> Tensor:
    """What is compared with fp64: the first image, the last pixels of a grid being in the last."""
    return torch.cat([image[:1], image[-1:]])


def forward(harness: Harness, size: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    arguments, _ = inputs(harness, shape, dtype)
    gates, addend, cell_prev = arguments
    hidden, cell = torch.empty_like(cell_prev), torch.empty_like(cell_prev)
    some = [part_of(tensor).double() for tensor in arguments]
    truth = lstm_gates(some[0], some[2], some[1])

    def call() -> tuple[Tensor, Tensor]:
        torch.ops.fastris.lstm_gates_out(gates, cell_prev, addend, None, None, hidden, cell)
        return hidden, cell

    def check(found: Sequence[Tensor]) -> str:
        return off_by([part_of(one) for one in found], truth, TOLERANCE[dtype])

    nchw = contiguous(arguments)
    peers = {
        "eager": ready(lambda: eager(*nchw)),
        "eager channels_last": ready(lambda: eager(*arguments)),
        "_thnn_fused_lstm_cell": Peer(partial(thnn, gates, addend, cell_prev)),
        "torch.compile": compiled(harness, eager, arguments),
        "torch.compile max-autotune": compiled(harness, eager, arguments, "max-autotune-no-cudagraphs"),
    }
    floor = partial(harness.byte_floor, count=11 * cell_prev.numel() * dtype.itemsize)
    with torch.no_grad():
        harness.measure(name_of(size, dtype, "forward"), call, check, peers, asked, floor)


def backward(harness: Harness, size: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    arguments, seeds = inputs(harness, shape, dtype)
    gates, addend, cell_prev = arguments
    d_hidden, d_cell = seeds
    d_gates, d_cell_prev = torch.empty_like(gates), torch.empty_like(cell_prev)
    some = [part_of(tensor).double().requires_grad_() for tensor in arguments]
    truth = torch.autograd.grad(
        lstm_gates(some[0], some[2], some[1]), (some[0], some[2]), [part_of(seed).double() for seed in seeds]
    )

    def call() -> tuple[Tensor, Tensor]:
        torch.ops.fastris.lstm_gates_backward_out(
            gates, cell_prev, addend, None, None, d_hidden, d_cell, d_gates, d_cell_prev, None
        )
        return d_gates, d_cell_prev

    def check(found: Any) -> str:
        return off_by([part_of(one) for one in found], truth, TOLERANCE[dtype])

    def leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensor.detach().requires_grad_() for tensor in tensors]

    def of_graph(function: Callable[..., Any], layout: Sequence[Tensor], gradients: Sequence[Tensor]) -> Peer:
        """The backward alone, of a forward that has run."""

        def make() -> Callable[[], Any]:
            mine = leaves(layout)
            results = function(*mine)
            return lambda: torch.autograd.grad(results, (mine[0], mine[2]), gradients, retain_graph=True)

        return Peer(make)

    def of_compiled(mode: str) -> Peer:
        def make() -> Callable[[], Any]:
            if harness.tiny:
                raise Absent("no compilation in a rehearsal")
            torch._dynamo.reset()
            return of_graph(torch.compile(eager, mode=mode, dynamic=False), arguments, seeds).make()

        return Peer(make)

    peers = {
        "eager": of_graph(eager, contiguous(arguments), contiguous(seeds)),
        "eager channels_last": of_graph(eager, arguments, seeds),
        "torch.compile": of_compiled("default"),
        "torch.compile max-autotune": of_compiled("max-autotune-no-cudagraphs"),
    }
    floor = partial(harness.byte_floor, count=16 * cell_prev.numel() * dtype.itemsize)
    harness.measure(name_of(size, dtype, "backward"), call, check, peers, asked, floor)
