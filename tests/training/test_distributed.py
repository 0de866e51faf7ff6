"""Two processes train what one does, and end together."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fastris
from fastris import InputError
from fastris.training import TrainConfig, Trainer
from fastris.training.checkpoints import list_checkpoints, read_state
from fastris.training.config import read_config
from fastris.training.distributed import process_group

WORKER = Path(__file__).with_name("distributed_worker.py")
UNEVEN = {"batch_size": [3, 3], "validation_crops": 5}  # no multiple of two


def torchrun(*arguments: object, timeout: float = 250) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=timeout)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [
            {key: value for key, value in row.items() if key != "images_per_second"} for row in csv.DictReader(file)
        ]


def forget_last_checkpoint(run: Path) -> None:
    """Make a run look as if it had been killed before its last steps."""
    shutil.rmtree(list_checkpoints(run / "checkpoints")[-1])


@pytest.fixture
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def assert_same_logs(one: Path, two: Path, columns: tuple[str, ...]) -> None:
    """Six digits are written, of which rounding in fp32 may change the last two in some steps."""
    for name in ("train.csv", "validation.csv"):
        for row, other in zip(rows(one / name), rows(two / name), strict=True):
            for column in set(columns) & set(row):
                assert float(row[column]) == pytest.approx(float(other[column]), rel=1e-4, abs=1e-6), (row, other)


def assert_close(name: str, tensor: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to rounding in fp64, by the largest number of a tensor; the gradient of a bias before a softmax is rounding
    alone, some 1e-17, and so are its moments."""
    error, largest = ((one.abs().max()) for one in (tensor - expected, expected))
    assert error <= 1e-9 * largest + 1e-15, f"{name}: {error:.1e} of {largest:.1e}"


def assert_same_run(one: Path, two: Path) -> None:
    """Equal logs, curriculum, weights, average and moments."""
    assert_same_logs(one, two, tuple(rows(one / "train.csv")[0]) + tuple(rows(one / "validation.csv")[0]))
    last = [list_checkpoints(run / "checkpoints")[-1] for run in (one, two)]
    states = [read_state(path) for path in last]
    for name in ("best", "level"):  # losses
        loss, other = (state["curriculum"].pop(name) for state in states)
        assert loss == pytest.approx(other, rel=1e-9)
    assert states[0] == states[1]
    tensors, others = (load_file(path / "state.safetensors") for path in last)
    assert tensors.keys() == others.keys() and {name.partition(".")[0] for name in tensors} == {
        "model",
        "average",
        "optimizer",
    }
    for name, tensor in tensors.items():
        assert_close(name, others[name], tensor)


@pytest.mark.slow
def test_two_processes_train_as_one_does_and_either_resumes_the_others_run(tmp_path, write_settings, double):
    """In fp64 sums in another order differ by 1e-16; some steps of training leave that far below 1e-9."""
    settings = write_settings(**UNEVEN, ema=0.9)
    config = TrainConfig.from_dict(read_config(settings))
    single = Trainer(config, tmp_path / "single")
    batch = single.batch(0, single.curriculum.stage)
    terms = single._loss(single.model, batch, *single._sizes(batch))
    names, parameters = zip(*single.model.named_parameters(), strict=True)
    gradients = dict(zip(names, torch.autograd.grad(terms.total, parameters), strict=True))
    single.run()
    shutil.copytree(tmp_path / "single", tmp_path / "one")
    forget_last_checkpoint(tmp_path / "one")

    result = torchrun(WORKER, settings, tmp_path)
    assert result.returncode == 0, result.stderr

    found = load_file(tmp_path / "many.safetensors")
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert_close(name, found[name], gradient)
    assert_same_run(tmp_path / "single", tmp_path / "many")
    assert_same_run(tmp_path / "single", tmp_path / "one")
    assert {path.name for path in tmp_path.glob("diverged-*")} == {"diverged-0", "diverged-1"}
    forget_last_checkpoint(tmp_path / "many")
    Trainer(config, tmp_path / "many", resume=True).run()
    assert_same_run(tmp_path / "single", tmp_path / "many")


def test_torchrun_trains_from_the_command_line_and_one_process_reports(tmp_path, write_settings):
    settings = write_settings(**UNEVEN)
    result = torchrun("-m", "fastris", "train", "--config", settings, "--out", tmp_path / "many", "--device", "cpu")
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"wrote {tmp_path / 'many' / 'model.safetensors'}\n"
    assert "by 2 processes" in result.stderr
    Trainer(TrainConfig.from_dict(read_config(settings)), tmp_path / "single").run()
    assert_same_logs(tmp_path / "single", tmp_path / "many", ("loss", "mask", "confidence", "place", "step", "stage"))
    assert fastris.load(tmp_path / "many" / "model.safetensors").config == fastris.ModelConfig.from_dict(
        read_config(settings)["model"]
    )


def test_a_rank_that_fails_ends_the_others(tmp_path, write_settings):
    """Without torchrun, which would kill them: by what the process group itself reports."""
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    start = time.monotonic()
    processes = [
        subprocess.Popen(
            [sys.executable, WORKER, write_settings()],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 1 for process in processes), (errors, time.monotonic() - start)
    assert "'NoneType' object is not callable" in errors[1]
    assert "Connection closed by peer" in errors[0]


def free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_a_batch_smaller_than_the_number_of_processes_is_named(config, tmp_path, monkeypatch):
    monkeypatch.setattr("fastris.training.trainer.world_size", lambda: 3)
    with pytest.raises(InputError, match=r"batch_size: 3 processes need as many crops in a batch, got \[2, 2\]"):
        Trainer(config, tmp_path)


def test_more_processes_than_gpus_are_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    expected = pytest.raises(InputError, match="nproc-per-node: expected at most one process for each of 2 GPUs")
    with expected, process_group(torch.device("cuda")):
        pass
