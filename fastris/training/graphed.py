"""Training steps that never wait for the device: as CUDA graphs, with their numbers read later.

B = batch, V = numbers that a step reports.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastris import backend
from fastris.data import Batch

MOST_GRAPHS = 64
"""Batches of further kinds run without a graph."""
LAG = 16
"""The most steps that the host is ahead of the device."""

TENSORS = ("images", "labels", "counts")

Update = Callable[..., Tensor]
"""A whole training step: a batch on the device and sizes, integers of the host → (V,) on the device."""


def can_be_graphed(device: torch.device) -> bool:
    """Whether a step can be captured: on CUDA, with every operator that the host would else take part in native."""
    operators = ("assignment", "soft_iou", "lstm_gates")
    return device.type == "cuda" and all(backend.runs_native(operator, "cuda") for operator in operators)


def new_adam(parameters: Iterable[Tensor], learning_rate: float, device: torch.device) -> torch.optim.Adam:
    """Adam; on CUDA fused, with its rate and step count on the device, so that a graph can hold it.

    On the CPU fused would be quicker than foreach, but a resumed run then differs in its last bits.
    """
    if device.type != "cuda":
        return torch.optim.Adam(parameters, lr=learning_rate, foreach=True)
    rate = torch.tensor(learning_rate, device=device)
    return torch.optim.Adam(parameters, lr=rate, fused=True, capturable=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Of the next step, in place where it is a tensor, as a captured step reads it there."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(learning_rate)
        else:
            group["lr"] = learning_rate


class _Recorded(NamedTuple):
    batch: Batch  # what the graph reads
    values: Tensor  # and writes
    replay: Callable[[], None]


class GraphedStep:
    """An update that is replayed as a CUDA graph from the second batch of a kind on.

    A kind is the shape of the images and the sizes, such as the most instances in an image and the number of recurrent
    steps; the counts of the images, read on the device, may be any. The first batch of a kind runs as it is, which
    warms up the libraries and makes the optimiser's state; for the second the graph is captured. All share a pool of
    memory.

    ``step(batch, *sizes)``, the batch on the host and best in page-locked memory, returns what the update returns,
    which the next step of the kind overwrites. Nothing waits for the device.
    """

    def __init__(self, update: Update, device: torch.device) -> None:
        self._update = update
        self._device = device
        self.forget()

    def forget(self) -> None:
        """Drop all graphs, where no more batches of their kinds will come."""
        self._seen: set[tuple[int, ...]] = set()
        self._recorded: dict[tuple[int, ...], _Recorded] = {}
        self._pool: Any = None

    def __call__(self, batch: Batch, *sizes: int) -> Tensor:
        kind = *batch.images.shape, *sizes
        if kind not in self._seen or (kind not in self._recorded and len(self._recorded) == MOST_GRAPHS):
            self._seen.add(kind)
            return self._update(batch.to(self._device, non_blocking=True), *sizes)
        if kind not in self._recorded:
            self._recorded[kind] = self._record(batch, sizes)
        batch_of_graph, values, replay = self._recorded[kind]
        for name in TENSORS:
            getattr(batch_of_graph, name).copy_(getattr(batch, name), non_blocking=True)
        replay()
        return values

    def _record(self, batch: Batch, sizes: tuple[int, ...]) -> _Recorded:
        room: dict[str, Any] = {name: torch.empty_like(getattr(batch, name), device=self._device) for name in TENSORS}
        batch_of_graph = replace(batch, **room)
        results: list[Tensor] = []
        replay, self._pool = capture(lambda: results.append(self._update(batch_of_graph, *sizes)), self._pool)
        return _Recorded(batch_of_graph, results[0], replay)


def capture(function: Callable[[], None], pool: Any) -> tuple[Callable[[], None], Any]:
    """Record what a function does on the current CUDA device, without doing it: ``(replay, pool)``."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        function()
    return graph.replay, graph.pool()


class Readback:
    """Rows of a log whose numbers are on their way from the device.

    On the CPU a row is there at once. On CUDA it follows within :data:`LAG` steps; the host waits only when it would
    get further ahead.

    Args:
        names: of the numbers in a step's values.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names
        self._waiting: deque[tuple[dict[str, Any], Tensor, torch.cuda.Event | None]] = deque()

    def put(self, row: dict[str, Any], values: Tensor) -> None:
        """Take a row and the values (V,) that it lacks."""
        arrived = None
        if values.device.type == "cuda":
            values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._waiting.append((row, values, arrived))

    def take(self, everything: bool = False) -> Iterator[dict[str, Any]]:
        """The rows that are complete, oldest first; with ``everything`` all, which waits for the device."""
        while self._waiting:
            row, values, arrived = self._waiting[0]
            if arrived is not None and not arrived.query():
                if not everything and len(self._waiting) <= LAG:
                    return
                arrived.synchronize()
            self._waiting.popleft()
            yield {**row, **dict(zip(self._names, values.tolist(), strict=True))}
