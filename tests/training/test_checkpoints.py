"""Checkpoints are whole or absent, and a bad one is named."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from fastris import InputError
from fastris.training.checkpoints import list_checkpoints, load_checkpoint, read_state, save_checkpoint


def make(seed: int = 0, width: int = 3) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = torch.nn.Linear(4, width)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model(torch.rand(2, 4)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_model_and_optimiser_come_back_to_the_bit(tmp_path):
    model, optimizer = make()
    path = save_checkpoint(tmp_path, 7, model, optimizer, {"note": "x"})
    other, other_optimizer = make(1)
    load_checkpoint(path, other, other_optimizer)
    assert read_state(path) == {"step": 7, "note": "x"}
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
        for key, value in optimizer.state[one].items():
            assert torch.equal(value, other_optimizer.state[two][key]), key


def test_only_the_newest_two_are_kept(tmp_path):
    model, optimizer = make()
    for step in (5, 10, 100):
        save_checkpoint(tmp_path, step, model, optimizer, {})
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000010", "step-00000100"]


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    model, optimizer = make()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tmp_path, 1, model, optimizer, {})
    assert not list(tmp_path.iterdir())


def test_a_truncated_checkpoint_is_named(tmp_path):
    model, optimizer = make()
    path = save_checkpoint(tmp_path, 1, model, optimizer, {})
    for name, action in (
        ("state.safetensors", lambda: load_checkpoint(path, *make())),
        ("state.json", lambda: read_state(path)),
    ):
        file = path / name
        file.write_bytes(file.read_bytes()[:-20])
        with pytest.raises(InputError, match=f"{name}: cannot (load|read) this checkpoint"):
            action()


def test_a_checkpoint_of_another_architecture_is_named(tmp_path):
    path = save_checkpoint(tmp_path, 1, *make(), {})
    with pytest.raises(InputError, match="state.safetensors: cannot load this checkpoint"):
        load_checkpoint(path, *make(width=5))
    save_file({"other": torch.zeros(1)}, path / "state.safetensors")
    with pytest.raises(InputError, match="state.safetensors: cannot load this checkpoint"):
        load_checkpoint(path, *make())
