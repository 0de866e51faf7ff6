"""A whole training step of the segmenter, replayed as a CUDA graph, beside eager and compiled ones with SciPy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastris
from fastris.data import Batch
from fastris.training.graphed import GraphedStep, new_adam
from gpu.harness import Absent, Harness, Peer, Row
from ris_step import CLIP, new_model, new_step

EAGER, COMPILED = "eager + SciPy", "torch.compile + SciPy"
LOSS_TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}
"""Of the first loss beside the reference in fp64 on the CPU; fp32 convolutions are in TF32."""


class Training:
    """A model, its optimiser, and steps of it on batches with other counts in turn."""

    def __init__(self, harness: Harness, batches: list[Batch], most: int, extra: int, dtype: str) -> None:
        self.device, self.dtype = harness.device, dtype
        self.batches, self.most, self.steps = batches, most, most + extra
        self.model = new_model().to(harness.device, memory_format=torch.channels_last)
        self.forward: Callable[..., Any] = self.model
        self.loss = fastris.RISLoss()
        self.optimizer = new_adam(self.model.parameters(), 1e-3, harness.device)
        self.done = 0

    def update(self, batch: Batch, most: int) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        images = batch.images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            output = self.forward(images, self.steps)
        terms = self.loss(output, batch.labels, batch.counts, most)
        terms.total.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        return terms.total.detach().reshape(1)

    def next_batch(self) -> Batch:
        self.done += 1
        return self.batches[self.done % len(self.batches)]

    def eager(self) -> Tensor:
        with fastris.use_backend("reference"):
            return self.update(self.next_batch().to(self.device), self.most)


def measure(harness: Harness) -> None:
    side, most = (32, 1) if harness.tiny else (128, 10)
    for size in (1,) if harness.tiny else (4, 16):
        for dtype in ("bfloat16", "float32"):
            one(harness, size, side, most, dtype)


def one(harness: Harness, size: int, side: int, most: int, dtype: str) -> None:
    made = new_step(size, side, most + 2, dtype)
    most = int(made.counts.max())
    fewer = torch.where(made.counts == most, most, (made.counts - 1).clamp_min(1))  # of the same graph
    batches = []
    for count in (made.counts, fewer):
        labels = torch.where(made.labels <= count.view(-1, 1, 1), made.labels, 0)
        batch = Batch(made.images, labels, count, [""] * size, [(side, side)] * size)
        batches.append(batch.pin_memory() if harness.cuda else batch)
    new = partial(Training, harness, batches, most, 2, dtype)
    with fastris.use_backend("reference"):
        output = new_model().double()(made.images.double(), most + 2)
        terms = fastris.RISLoss()(output, batches[1].labels, batches[1].counts, most)
    truth = float(terms.total.detach())

    def check(first: Any) -> str:
        """The first loss of a training, which is on the second batch."""
        off = abs(float(first) - truth) / abs(truth)
        return "" if off <= LOSS_TOLERANCE[dtype] else f"the first loss is {float(first)}, not {truth}"

    class Once:
        """A step that always returns the first one's loss, for the check."""

        def __init__(self, step: Callable[[], Tensor]) -> None:
            self.step = step
            self.first = step().clone()

        def __call__(self) -> Tensor:
            self.step()
            return self.first

    def graphed() -> Callable[[], Tensor]:
        training = new()
        if not harness.cuda:  # nothing to capture
            return Once(lambda: training.update(training.next_batch(), most))
        replayed = GraphedStep(training.update, harness.device)
        call = Once(lambda: replayed(training.next_batch(), most))
        call()  # captures
        torch.cuda.synchronize()
        try:
            torch.cuda.set_sync_debug_mode("error")
            for _ in range(4):
                call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        harness.facts["host syncs of a step"] = 0
        return call

    def of_compiled() -> Peer:
        def make() -> Callable[[], Tensor]:
            if harness.tiny:
                raise Absent("no compilation in a rehearsal")
            torch._dynamo.reset()
            training = new()
            training.forward = torch.compile(training.model, dynamic=False)
            return Once(training.eager)

        return Peer(make, on_host=True)

    def not_graphed() -> Callable[[], Tensor]:
        training = new()
        return Once(lambda: training.update(training.next_batch().to(harness.device), most))

    peers = {
        EAGER: Peer(lambda: Once(new().eager), on_host=True),
        "fastris without a graph": Peer(not_graphed, on_host=True),
    }
    if size < 16:  # it compiles for minutes
        peers[COMPILED] = of_compiled()

    def asked(row: Row) -> None:
        row.ahead_of(EAGER, 3)
        if COMPILED in peers:
            row.ahead_of(COMPILED, 1.5)

    name = f"training step B{size} {side}² T{most + 2} {dtype}"
    try:
        call = graphed()
    except Exception as error:
        message = f"{type(error).__name__}: {error}"[:200]

        def call() -> Tensor:
            raise RuntimeError(message)

    harness.measure(name, call, check, peers, asked, on_host=True)
