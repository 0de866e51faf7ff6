"""Batches from worker processes: the same as without, in order, with errors of one line, and no process left."""

from __future__ import annotations

import gc
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fastris import InputError
from fastris.cli import main
from fastris.data import Batch
from fastris.training import Trainer
from fastris.training.ahead import batches_ahead
from fastris.training.checkpoints import list_checkpoints


def named(step: int) -> Batch:
    """A batch that knows its step and the process that made it."""
    return Batch(torch.full((1, 3, 2, 2), step), torch.zeros(1, 2, 2), torch.zeros(1), [str(os.getpid())], [(2, 2)])


def assert_same_run(one: Path, two: Path) -> None:
    for file in ("model.safetensors", "checkpoints/step-00000006/state.safetensors"):
        left, right = load_file(one / file), load_file(two / file)
        assert all(torch.equal(left[name], right[name]) for name in left | right), file


def test_they_come_in_order_from_other_processes_which_end():
    batches = list(batches_ahead(named, range(3, 20), 2))
    assert [int(batch.images[0, 0, 0, 0]) for batch in batches] == list(range(3, 20))
    makers = {batch.names[0] for batch in batches}
    assert len(makers) == 2 and str(os.getpid()) not in makers
    gc.collect()
    assert not multiprocessing.active_children()


def test_the_global_random_numbers_do_not_notice():
    before = torch.get_rng_state()
    next(batches_ahead(named, range(2), 1))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_error_comes_as_it_was_raised_and_at_its_step():
    def broken(step: int) -> Batch:
        if step == 2:
            raise InputError("b.png: not an image")
        return named(step)

    ahead = batches_ahead(broken, range(5), 2)
    next(ahead), next(ahead)
    with pytest.raises(InputError, match=r"^b\.png: not an image$"):
        next(ahead)


def test_only_where_forking_is_safe(monkeypatch):
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(InputError, match="workers: .* use 0 on darwin"):
        next(batches_ahead(named, range(2), 1))


def test_a_run_is_the_same_whatever_the_number_of_workers(config, tmp_path):
    """Over a change of stage, and where nothing is cached."""
    Trainer(config, tmp_path / "none").run()
    for workers in (1, 2):
        trainer = Trainer(config.updated({"workers": workers}), tmp_path / str(workers))
        trainer.train_data._cache.clear()
        trainer.train_data._room = 0
        trainer.run()
        assert_same_run(tmp_path / "none", tmp_path / str(workers))
    gc.collect()
    assert not multiprocessing.active_children()


def test_a_run_resumes_with_other_workers(config, tmp_path, monkeypatch):
    Trainer(config, tmp_path / "straight").run()
    broken = Trainer(config.updated({"workers": 2}), tmp_path / "broken")
    good = broken.batch

    def interrupted(step, stage):
        if step == 5:
            raise InputError("interrupted")
        return good(step, stage)

    broken.batch = interrupted  # type: ignore[method-assign]
    with pytest.raises(InputError, match="interrupted"):
        broken.run()
    assert list_checkpoints(tmp_path / "broken/checkpoints")[-1].name == "step-00000004"
    Trainer(config.updated({"workers": 1}), tmp_path / "broken", resume=True).run()
    assert_same_run(tmp_path / "straight", tmp_path / "broken")


def test_the_command_line(write_settings, tmp_path, capsys):
    base = ["train", "--config", str(write_settings()), "--out", str(tmp_path / "run")]
    assert main([*base, "--workers", "2"]) == 0
    assert main([*base, "--resume", "--workers", "1", "--max-steps", "8"]) == 0
    assert main(["train", "--workers", "-1", "--out", str(tmp_path / "other")]) == 2
    assert "workers: expected a number from 0, got -1" in capsys.readouterr().err


def test_of_a_class_only_the_images_that_have_it(write_settings, tmp_path, capsys):
    """Cityscapes with a person in one image of two; to train on, beside a group of persons, which is void."""
    for split, right in (("train", 24), ("val", 7)):
        for city, value in (("aachen", 24000), ("bochum", 26000)):
            name = f"{city}_000000_000000"
            image = tmp_path / f"leftImg8bit/{split}/{city}/{name}_leftImg8bit.png"
            ids = tmp_path / f"gtFine/{split}/{city}/{name}_gtFine_instanceIds.png"
            values = np.full((32, 32), value, np.uint16)
            values[:, 20:] = right
            for path, pixels in ((image, np.zeros((32, 32, 3), np.uint8)), (ids, values)):
                path.parent.mkdir(parents=True)
                Image.fromarray(pixels).save(path)
    base = ["train", "--config", str(write_settings(data=str(tmp_path)))]
    assert main([*base, "--data-class", "person", "--out", str(tmp_path / "run")]) == 0
    assert "1 images, 1 for validation" in capsys.readouterr().err
    assert main([*base, "--out", str(tmp_path / "all")]) == 0
    assert "2 images, 2 for validation" in capsys.readouterr().err
    assert main([*base, "--data-class", "bus", "--out", str(tmp_path / "none")]) == 2
    assert "no images in split 'train'" in capsys.readouterr().err
    assert main(["train", "--data", "leaves", "--data-class", "person", "--out", str(tmp_path / "leaves")]) == 2
    assert "data_class: leaves has no classes to choose 'person' from" in capsys.readouterr().err
