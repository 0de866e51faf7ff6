"""Steps that never wait for the device: what a step reads on the host, which steps a graph replays, and with what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastris
from fastris import backend
from fastris.data import Batch
from fastris.training import Trainer, graphed
from fastris.training.graphed import LAG, GraphedStep, Readback, new_adam, set_learning_rate

CPU = torch.device("cpu")
NAMES = ("loss", "norm")

READS = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "unique", "_unique2", "equal"}
"""Operators whose result, or its size, is a number on the host."""


class HostReads(TorchDispatchMode):
    """Collects the operators that would make the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2].partition(".")[0]
        by_mask = name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1])
        moves = name == "_to_copy" and (kwargs or {}).get("device", args[0].device) not in (None, args[0].device)
        if name in READS or by_mask or moves:
            self.found.append(func.name())
        return func(*args, **(kwargs or {}))


def batch_of(*counts: int, side: int = 16) -> Batch:
    size = len(counts), side, side
    labels = torch.zeros(size, dtype=torch.int64)
    for image, count in enumerate(counts):
        for label in range(1, count + 1):
            labels[image, 3 * label : 3 * label + 3, image : image + 4] = label
    return Batch(torch.rand(len(counts), 3, side, side), labels, torch.tensor(counts), [""] * len(counts), [])


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.to("meta"),
    ],
)
def test_the_next_test_can_fail(read: Callable[[Tensor], Any]) -> None:
    with HostReads() as reads:
        read(torch.ones(3))
    assert reads.found


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bf16", "loss_variant": "all"},
        {"gradient_norm": 0.0, "place_weight": 0.0, "model": {"mask_head": "inhibition", "feedback": False}},
    ],
)
def test_an_update_reads_nothing_on_the_host(config, tmp_path, changes) -> None:
    trainer = Trainer(config.updated(changes), tmp_path)
    # as on CUDA; its constructor alone looks at the rate
    trainer.optimizer = torch.optim.Adam(trainer.model.parameters(), lr=1e-3, fused=True, capturable=True)
    trainer.optimizer.param_groups[0]["lr"] = torch.tensor(1e-3)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    batch = batch_of(2, 0, side=32)
    with HostReads() as reads:
        values = trainer._update(batch, 2, 4)
        set_learning_rate(trainer.optimizer, 2e-3)
        trainer._update(batch, 2, 4)
    assert reads.found == []
    assert values.shape == (6,) and values.isfinite().all()
    assert any(not torch.equal(one, two) for one, two in zip(before, trainer.model.parameters(), strict=True))


def test_the_rate_of_a_graph_changes_in_place() -> None:
    weight = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=torch.tensor(1.0), foreach=False)
    rate = optimizer.param_groups[0]["lr"]
    set_learning_rate(optimizer, 0.25)
    assert optimizer.param_groups[0]["lr"] is rate and float(rate) == 0.25
    plain = new_adam([weight], 1.0, CPU)
    set_learning_rate(plain, 0.5)
    assert plain.param_groups[0]["lr"] == 0.5


class Recorder:
    """What a device does in a capture: nothing, but the same work on the same memory at every replay."""

    def __init__(self) -> None:
        self.recording: list[Callable[[], Any]] | None = None
        self.updates = self.captures = self.replays = 0
        self.pools: list[Any] = []

    def capture(self, function: Callable[[], None], pool: Any) -> tuple[Callable[[], None], Any]:
        self.captures += 1
        self.pools.append(pool)
        work = self.recording = []
        function()
        self.recording = None

        def replay() -> None:
            self.replays += 1
            for one in work:
                one()

        return replay, "pool"

    def update(self, batch: Batch, most: int) -> Tensor:
        self.updates += 1
        values = torch.full((2,), torch.nan)

        def work() -> None:
            values.copy_(torch.stack([batch.images.sum() + batch.labels.sum(), most * batch.counts.sum()]))

        if self.recording is None:
            work()
        else:
            self.recording.append(work)
        return values


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(graphed, "capture", recorder.capture)
    return recorder


def check(step: GraphedStep, batch: Batch) -> None:
    most = int(batch.counts.max())
    expected = torch.stack([batch.images.sum() + batch.labels.sum(), most * batch.counts.sum()])
    torch.testing.assert_close(step(batch, most), expected)


def test_batches_of_a_kind_share_a_graph_whatever_their_counts(recorder: Recorder) -> None:
    step = GraphedStep(recorder.update, CPU)
    for counts in ((2, 1), (1, 2), (0, 2), (2, 2)):
        check(step, batch_of(*counts))
    assert (recorder.captures, recorder.replays) == (1, 3)
    assert recorder.updates == 2  # the first batch as it is, and the capture


def test_the_most_instances_and_the_size_make_a_kind(recorder: Recorder) -> None:
    step = GraphedStep(recorder.update, CPU)
    kinds = [batch_of(2, 1), batch_of(3, 1), batch_of(2, 1, side=24), batch_of(2, 1, 1)]
    for batch in kinds * 3:
        check(step, batch)
    assert (recorder.captures, recorder.replays) == (4, 8)
    assert recorder.pools == [None, "pool", "pool", "pool"]


def test_what_a_graph_reads_is_no_memory_of_the_batch(recorder: Recorder) -> None:
    step = GraphedStep(recorder.update, CPU)
    batches = [batch_of(2, 1) for _ in range(3)]
    second = batches[1].images.clone()
    for batch in batches:
        check(step, batch)
    assert torch.equal(batches[1].images, second)


def test_graphs_that_are_forgotten_are_captured_again(recorder: Recorder) -> None:
    step = GraphedStep(recorder.update, CPU)
    for _ in range(2):
        for _ in range(3):
            check(step, batch_of(2, 1))
        step.forget()
    assert (recorder.captures, recorder.replays, recorder.pools) == (2, 4, [None, None])


def test_the_steps_of_a_batch_make_a_kind_too(config, tmp_path) -> None:
    """A growing curriculum has the same images and counts at each stage, and more steps."""
    trainer = Trainer(config.updated({"image_size": (32, 32)}), tmp_path)
    batch = batch_of(5, 1, side=32)
    found = []
    for index in range(2):
        trainer.curriculum.index = index
        found.append(trainer._sizes(batch))
    assert found == [(5, 2), (5, 4)]


def test_there_is_a_limit_to_the_graphs(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphed, "MOST_GRAPHS", 1)
    step = GraphedStep(recorder.update, CPU)
    for batch in [batch_of(2, 1), batch_of(3, 1)] * 3:
        check(step, batch)
    assert recorder.captures == 1


def test_rows_of_the_cpu_are_complete_at_once() -> None:
    readback = Readback(NAMES)
    readback.put({"step": 1}, torch.tensor([0.5, 2.0]))
    assert list(readback.take()) == [{"step": 1, "loss": 0.5, "norm": 2.0}]
    assert list(readback.take()) == []


class Event:
    """A CUDA event that the host can see pass, or wait for."""

    def __init__(self) -> None:
        self.passed = self.waited = False

    def query(self) -> bool:
        return self.passed

    def synchronize(self) -> None:
        self.passed = self.waited = True


def test_the_host_waits_only_when_it_is_far_ahead_or_everything_is_wanted() -> None:
    readback = Readback(NAMES)
    events = [Event() for _ in range(LAG + 1)]
    for step, event in enumerate(events[:-1]):
        readback._waiting.append(({"step": step}, torch.zeros(2), event))
    assert list(readback.take()) == []
    events[0].passed = True
    assert [row["step"] for row in readback.take()] == [0]
    readback._waiting.append(({"step": LAG}, torch.zeros(2), events[-1]))
    readback._waiting.append(({"step": LAG + 1}, torch.zeros(2), Event()))
    assert [row["step"] for row in readback.take()] == [1]
    assert [event.waited for event in events[:3]] == [False, True, False]
    assert [row["step"] for row in readback.take(everything=True)] == list(range(2, LAG + 2))


def test_there_are_no_graphs_on_the_cpu(config, tmp_path) -> None:
    assert not graphed.can_be_graphed(CPU)
    assert Trainer(config, tmp_path)._graphed_update is None


def test_graphs_need_operators_that_leave_the_host_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "why_not_native", lambda operator, device_type: None)
    assert graphed.can_be_graphed(torch.device("cuda"))
    with fastris.use_backend("reference"):
        assert not graphed.can_be_graphed(torch.device("cuda"))


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_graphs_train_as_the_steps_themselves_do(config, tmp_path, precision) -> None:
    """Not to the bit: torch's bilinear backward adds with atomics."""
    values = {}
    for graph in (False, True):
        trainer = Trainer(config.updated({"precision": precision, "cuda_graph": graph}), tmp_path / str(graph), "cuda")
        assert (trainer._graphed_update is not None) == graph
        update = trainer._graphed_update or (lambda batch, *sizes, run=trainer._update: run(batch.to("cuda"), *sizes))
        torch.manual_seed(1)
        rows = []
        for step, counts in enumerate([(2, 1), (2, 0), (1, 2), (1, 1), (1, 0), (2, 2), (0, 1), (1, 2)]):
            set_learning_rate(trainer.optimizer, 1e-3 / (step + 1))
            rows.append(update(batch_of(*counts, side=32).pin_memory(), max(counts), max(counts) + 2).clone())
        values[graph] = torch.stack(rows).cpu()
        if graph:
            assert len(trainer._graphed_update._recorded) == 2
    tolerance = 1e-3 if precision == "fp32" else 3e-2
    torch.testing.assert_close(values[True], values[False], rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
def test_steps_do_not_wait_for_the_gpu(config, tmp_path, no_sync) -> None:
    trainer = Trainer(config.updated({"max_steps": 40, "ema": 0.9, "precision": "bf16"}), tmp_path, "cuda")
    batch = batch_of(2, 1, side=32)
    trainer.batch = lambda step, stage: batch  # type: ignore[method-assign]
    for _ in range(2):  # compiles, then captures
        trainer._train_step()
    torch.cuda.synchronize()
    with no_sync():
        for _ in range(4):
            trainer._train_step()
    rows = list(trainer._complete_rows(everything=True))
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["loss"] < rows[0]["loss"]


@pytest.mark.gpu
def test_a_run_on_a_gpu_logs_every_step_and_resumes(config, tmp_path) -> None:
    Trainer(config.updated({"max_steps": 4}), tmp_path, "cuda").run()
    Trainer(config.updated({"max_steps": 8}), tmp_path, "cuda", resume=True).run()
    lines = (tmp_path / "train.csv").read_text().splitlines()
    assert [line.partition(",")[0] for line in lines] == ["step", *map(str, range(1, 9))]
