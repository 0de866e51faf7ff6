"""The loop: it learns, it can be killed and resumed, and it stops where the loss breaks."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import fastris
from fastris import InputError
from fastris.data import collate
from fastris.metrics import InstanceMetrics
from fastris.training import PRESETS, DivergedError, TrainConfig, Trainer
from fastris.training.checkpoints import list_checkpoints
from fastris.training.log import RunLog


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def without_times(path: Path) -> list[dict[str, str]]:
    return [{key: value for key, value in row.items() if key != "images_per_second"} for row in rows(path)]


@pytest.mark.slow
def test_it_overfits_two_images_to_the_exact_count(tmp_path):
    config = TrainConfig(
        data="leaves:2", max_steps=250, instances=(8,), crop=(64,), batch_size=(2,), stage_limit=(1.0,),
        validate_every=250, validation_crops=1, learning_rate=2e-3, warmup=20, jitter=0.0,
    )  # fmt: skip
    trainer = Trainer(config, tmp_path)
    images = collate([trainer.train_data[index] for index in range(2)])
    trainer.batch = lambda step, stage: images  # type: ignore[method-assign]
    start = time.process_time()
    trainer.run()
    spent = time.process_time() - start
    metrics = InstanceMetrics()
    for image, labels in zip(images.images, images.labels, strict=True):
        metrics.update(trainer.model.eval().predict(image).label_map(), labels)
    assert metrics.compute()["sbd"] >= 0.9, metrics.rows
    assert [row["count"] for row in metrics.rows] == [row["target_count"] for row in metrics.rows]
    assert spent / 2 < 60, "seconds on two cores"


def test_a_run_leaves_a_model_logs_and_checkpoints(config, tmp_path):
    path = Trainer(config, tmp_path).run()
    model = fastris.load(path)
    assert model.config == config.model
    assert len(model.predict(torch.rand(3, 40, 40))) <= 6
    assert [int(row["step"]) for row in rows(tmp_path / "train.csv")] == [1, 2, 3, 4, 5, 6]
    assert [(row["step"], row["stage"]) for row in rows(tmp_path / "validation.csv")] == [
        ("2", "1"),
        ("4", "1"),
        ("6", "2"),
    ]
    assert [one.name for one in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000004", "step-00000006"]
    assert list((tmp_path / "tensorboard").glob("events*"))
    from fastris.loading import read_metadata

    assert TrainConfig.from_dict(read_metadata(path)["training"]) == config


def test_batches_depend_on_seed_and_step_alone(config, tmp_path):
    first, second = Trainer(config, tmp_path / "a"), Trainer(config, tmp_path / "b")
    stage = first.curriculum.stage
    for step in (3, 0, 1):
        assert torch.equal(first.batch(step, stage).images, second.batch(step, stage).images)
    assert not torch.equal(first.batch(0, stage).images, first.batch(1, stage).images)
    other = Trainer(config.updated({"seed": 1}), tmp_path / "c")
    assert not torch.equal(first.batch(0, stage).images, other.batch(0, stage).images)


def test_a_killed_run_resumes_to_the_same_bits(tmp_path, write_settings):
    settings = write_settings(max_steps=40, validate_every=4, ema=0.9)
    command = [sys.executable, "-m", "fastris", "train", "--config", str(settings), "--out"]

    straight, broken = tmp_path / "straight", tmp_path / "broken"
    subprocess.run([*command, str(straight)], check=True, capture_output=True, timeout=200)
    killed = subprocess.Popen([*command, str(broken)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while not list_checkpoints(broken / "checkpoints") and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert not (broken / "checkpoints" / "step-00000040").exists()
    subprocess.run([*command, str(broken), "--resume"], check=True, capture_output=True, timeout=200)

    for file in ("model.safetensors", "checkpoints/step-00000040/state.safetensors"):
        one, two = load_file(straight / file), load_file(broken / file)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one), file
    for file in ("train.csv", "validation.csv"):
        assert without_times(straight / file) == without_times(broken / file)


def test_resuming_drops_the_log_after_the_checkpoint(config, tmp_path):
    Trainer(config, tmp_path).run()
    with (tmp_path / "train.csv").open("a") as file:
        file.write("7,2,9,9,9,9,9,9,9\n8,2,9")  # as a killed run might leave it
    trainer = Trainer(config.updated({"max_steps": 8}), tmp_path, resume=True)
    assert trainer.step == 6
    trainer.run()
    assert [int(row["step"]) for row in rows(tmp_path / "train.csv")] == list(range(1, 9))
    assert all(row["loss"] != "9" for row in rows(tmp_path / "train.csv"))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(config, tmp_path):
    trainer = Trainer(config, tmp_path)
    good = trainer.batch

    def poisoned(step, stage):
        batch = good(step, stage)
        if step == 3:
            batch.images[0, 0, 0, 0] = float("nan")
        return batch

    trainer.batch = poisoned  # type: ignore[method-assign]
    with pytest.raises(DivergedError, match="not finite .nan. at step 3; the last good checkpoint is .*step-00000002"):
        trainer.run()
    kept = list_checkpoints(tmp_path / "checkpoints")
    assert [path.name for path in kept] == ["step-00000002"]
    assert all(tensor.isfinite().all() for tensor in load_file(kept[0] / "state.safetensors").values())
    assert fastris.load(tmp_path / "model.safetensors")
    assert Trainer(config, tmp_path, resume=True).run().is_file()


def test_a_folder_with_a_run_is_not_overwritten(config, tmp_path):
    Trainer(config, tmp_path).run()
    with pytest.raises(InputError, match="holds a run already; continue it with --resume"):
        Trainer(config, tmp_path)


def test_there_must_be_something_to_resume(config, tmp_path):
    with pytest.raises(InputError, match="checkpoints: no checkpoint to resume from"):
        Trainer(config, tmp_path, resume=True)


def test_a_checkpoint_without_its_state_is_named(config, tmp_path):
    Trainer(config, tmp_path).run()
    file = list_checkpoints(tmp_path / "checkpoints")[-1] / "state.json"
    file.write_text(json.dumps({"step": 6}))
    with pytest.raises(InputError, match="state.json: damaged"):
        Trainer(config, tmp_path, resume=True)


def test_every_parameter_has_a_gradient_where_no_image_has_an_instance(config, tmp_path):
    """DistributedDataParallel waits for all of them, and Adam must move the same ones on every rank."""
    trainer = Trainer(config.updated({"extra_steps": 0}), tmp_path)
    batch = trainer.batch(0, trainer.curriculum.stage)
    empty = replace(batch, labels=torch.zeros_like(batch.labels), counts=torch.zeros_like(batch.counts))
    trainer._loss(trainer.model, empty, *trainer._sizes(empty)).total.backward()
    assert all(parameter.grad is not None for parameter in trainer.model.parameters())


@pytest.mark.parametrize(("bf16", "amx"), [(False, False), (True, False), (False, True)])
def test_the_precision_is_the_one_that_the_machine_multiplies(config, tmp_path, monkeypatch, bf16, amx):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    trainer = Trainer(config.updated({"precision": "auto"}), tmp_path)
    assert trainer.precision == ("bf16" if bf16 or amx else "fp32")
    assert Trainer(config.updated({"precision": "bf16"}), tmp_path / "chosen").precision == "bf16"


def test_mixed_precision_trains_with_weights_and_moments_in_fp32(config, tmp_path):
    trainer = Trainer(config.updated({"precision": "bf16"}), tmp_path)
    assert trainer.run().is_file()
    moments = [tensor for state in trainer.optimizer.state.values() for tensor in state.values()]
    kept = [*trainer.model.parameters(), *(parameter.grad for parameter in trainer.model.parameters()), *moments]
    assert moments and all(tensor.dtype == torch.float32 for tensor in kept)


def test_mixed_precision_lowers_the_loss(config, tmp_path):
    changes = {"max_steps": 32, "learning_rate": 1e-2, "jitter": 0.0, "precision": "bf16", "stage_limit": [0.9, 1.0]}
    trainer = Trainer(config.updated(changes), tmp_path)
    images = trainer.batch(0, trainer.curriculum.stage)
    trainer.batch = lambda step, stage: images  # type: ignore[method-assign]
    for _ in range(30):
        trainer._train_step()
    losses = [row["loss"] for row in trainer._complete_rows(everything=True)]
    assert losses[-1] < losses[0] / 2


def test_mixed_precision_runs_the_network_in_bf16_and_cells_and_loss_in_fp32(config, tmp_path):
    seen: dict[str, set[torch.dtype]] = {}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.name().partition("::")[2].partition(".")[0]
            for k, argument in enumerate(args):
                if isinstance(argument, torch.Tensor) and argument.is_floating_point():
                    seen.setdefault(f"{name} {k}", set()).add(argument.dtype)
            return func(*args, **(kwargs or {}))

    trainer = Trainer(config.updated({"precision": "bf16"}), tmp_path)
    batch = trainer.batch(0, trainer.curriculum.stage)
    with Watch():
        terms = trainer._loss(trainer.model, batch, *trainer._sizes(batch))
        terms.total.backward()
    bf16, fp32 = {torch.bfloat16}, {torch.float32}
    assert seen["convolution 0"] == seen["addmm 1"] == seen["lstm_gates 0"] == bf16
    assert seen["lstm_gates 1"] == seen["soft_iou 0"] == seen["assignment 0"] == seen["_log_softmax 0"] == fp32
    assert seen["binary_cross_entropy_with_logits 0"] == fp32 and terms.total.dtype == torch.float32


def test_the_rate_warms_up_and_falls_to_zero(config, tmp_path):
    trainer = Trainer(config, tmp_path)
    rates = [trainer.learning_rate(step) for step in range(7)]
    assert rates[0] == pytest.approx(0.5e-3) and rates[1] == pytest.approx(1e-3 * 5 / 6) and rates[6] == 0


def test_the_average_of_the_weights_is_what_is_validated_and_saved(config, tmp_path):
    trainer = Trainer(config.updated({"ema": 0.5, "max_steps": 3, "validate_every": 3}), tmp_path)
    weights = []
    for _ in range(3):
        trainer._train_step()
        weights.append([parameter.detach().clone() for parameter in trainer.model.parameters()])
    averages = [(one + two) / 4 + three / 2 for one, two, three in zip(*weights, strict=True)]
    for parameter, expected in zip(trainer.product.parameters(), averages, strict=True):
        torch.testing.assert_close(parameter, expected)
    trainer._keep(trainer._validate())
    saved = fastris.load(tmp_path / "model.safetensors").state_dict()
    for name, tensor in trainer.product.state_dict().items():
        assert torch.equal(saved[name], tensor), name


def test_a_run_can_start_from_a_model(config, tmp_path):
    path = Trainer(config, tmp_path / "first").run()
    trainer = Trainer(config.updated({"initial": str(path)}), tmp_path / "second")
    assert all(torch.equal(one, load_file(path)[name]) for name, one in trainer.model.state_dict().items())
    other = config.updated({"initial": str(path), "model": {"hidden_channels": 16}})
    with pytest.raises(InputError, match="initial: .*another architecture"):
        Trainer(other, tmp_path / "third")


def test_a_run_leaves_a_picture_of_its_curves(config, tmp_path):
    from PIL import Image

    Trainer(config, tmp_path).run()
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > picture.height > 100


def test_curves_are_drawn_at_a_validation_at_most_once_a_minute(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("fastris.viz.save_training_curves", lambda run, path: drawn.append(path))
    now = iter([0.0, 59.0, 61.0, 62.0, 120.0, 123.0, 124.0, 130.0])
    monkeypatch.setattr("fastris.training.log.time", SimpleNamespace(monotonic=lambda: next(now)))
    log = RunLog(tmp_path)
    row = dict.fromkeys(RunLog.validation_columns, 1)
    for expected in (0, 1, 1, 2):  # after 59 s; 61 s, drawn by 62; 58 s later; 61 s later, drawn by 124
        log.validation(row)
        assert len(drawn) == expected
    log.close()
    assert drawn == [tmp_path / "curves.png"] * 3


def test_a_run_without_matplotlib_goes_on_without_the_picture(config, tmp_path, monkeypatch):
    for module in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    assert Trainer(config, tmp_path).run().is_file()
    assert not (tmp_path / "curves.png").exists()


def test_a_picture_that_cannot_be_written_does_not_end_the_run(tmp_path, monkeypatch):
    def full(run, path):
        raise OSError("disk full")

    monkeypatch.setattr("fastris.viz.save_training_curves", full)
    log = RunLog(tmp_path)
    log.redraw_after = 0.0
    log.validation(dict.fromkeys(RunLog.validation_columns, 1))
    log.close()
    assert (tmp_path / "validation.csv").read_text().count("\n") == 2


WHOLE = {
    "instances": [2, 3, 0], "growth": 1, "patience": 1, "plateau": 0.9, "crop": [32, 32, 32], "batch_size": [2, 2, 2],
    "stage_limit": [1.0, 1.0, 1.0], "image_size": [32, 40], "rotation": 20.0, "decay": False, "max_steps": 10,
    "validate_every": 1, "validation_crops": 1,
}  # fmt: skip


def test_a_run_interrupted_while_its_curriculum_grows_resumes_to_the_same_bits(config, tmp_path):
    config = config.updated(WHOLE)
    straight = Trainer(config, tmp_path / "straight")
    straight.run()
    broken = Trainer(config, tmp_path / "broken")
    batch = broken.batch

    def interrupted(step, stage):
        if step == 5:
            raise KeyboardInterrupt
        return batch(step, stage)

    broken.batch = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    resumed = Trainer(config, tmp_path / "broken", resume=True)
    assert (resumed.step, resumed.curriculum.index) == (5, 1) and resumed.curriculum.grown > 0
    assert resumed.curriculum.state_dict() == broken.curriculum.state_dict()
    resumed.run()
    assert straight.curriculum.state_dict() == resumed.curriculum.state_dict()
    for file in ("model.safetensors", "checkpoints/step-00000010/state.safetensors"):
        one, two = load_file(tmp_path / "straight" / file), load_file(tmp_path / "broken" / file)
        assert all(torch.equal(one[name], two[name]) for name in one), file
    for file in ("train.csv", "validation.csv"):
        assert without_times(tmp_path / "straight" / file) == without_times(tmp_path / "broken" / file)


def test_whole_images_show_all_and_the_curriculum_limits_the_steps(config, tmp_path):
    trainer = Trainer(config.updated(WHOLE), tmp_path)
    assert trainer.curriculum.most == max(sample.count for sample in [*trainer.train_data, *trainer.validation_data])
    seen = []
    forward = trainer.model.forward
    trainer.model.forward = lambda images, steps: seen.append((tuple(images.shape), steps)) or forward(images, steps)
    batch = trainer.batch(0, trainer.curriculum.stage)
    most = int(batch.counts.max())
    for index, steps in ((0, 2), (1, 3), (2, most + 2)):
        trainer.curriculum.index = index
        trainer._loss(trainer.model, batch, *trainer._sizes(batch))
        assert seen[-1] == ((2, 3, 32, 40), steps)
    trainer.curriculum.index, trainer.curriculum.grown = 1, 1
    trainer._loss(trainer.model, batch, *trainer._sizes(batch))
    assert seen[-1][1] == 4 <= most


def test_crops_of_a_stage_of_all_instances_are_not_narrowed(config, tmp_path):
    trainer = Trainer(config.updated({"instances": [2, 0], "crop": [64, 64]}), tmp_path)
    whole = [sample.count for sample in trainer.train_data]
    narrowed = trainer.batch(0, trainer.curriculum.stage).counts
    trainer.curriculum.index = 1
    batch = trainer.batch(0, trainer.curriculum.stage)
    assert narrowed.max() <= 2 < batch.counts.min() and set(batch.counts.tolist()) <= set(whole)


def test_the_loss_is_what_the_settings_ask_for(config, tmp_path):
    asked = {
        "loss_variant": "all", "loss_resolution": "map", "confidence_weight": 0.5, "place_weight": 0.2,
        "per_instance": False,
    }  # fmt: skip
    loss = Trainer(config.updated(asked), tmp_path).loss
    assert (loss.variant, loss.resolution, loss.confidence_weight) == ("all", "map", 0.5)
    assert (loss.place_weight, loss.per_instance) == (0.2, False)


def test_a_learning_rate_can_stay(config, tmp_path):
    trainer = Trainer(config.updated({"decay": False, "warmup": 0}), tmp_path)
    assert [trainer.learning_rate(step) for step in (0, 5)] == [config.learning_rate] * 2


def test_the_papers_plants_network_trains(tmp_path):
    config = TrainConfig().updated(PRESETS["paper-plants"])
    config = config.updated(
        {"data": "leaves:3", "max_steps": 2, "validate_every": 2, "validation_crops": 1, "model": {"max_steps": 2}}
    )
    trainer = Trainer(config, tmp_path)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    batch = trainer.batch(0, trainer.curriculum.stage)
    assert batch.images.shape == (1, 3, 530, 500)
    with torch.no_grad():
        assert trainer.model(batch.images, 1).mask_logits.shape == (1, 1, 106, 100)
    model = fastris.load(trainer.run())
    assert model.config == config.model
    for name, parameter in trainer.model.named_parameters():
        moved = (parameter - before[name]).abs().max().item()
        assert 0 < moved <= 2.1e-4 or name.endswith("project.bias"), name  # Adam's first steps are about the rate each
    assert [row["stage"] for row in rows(tmp_path / "train.csv")] == ["1", "1"]


def test_fcn8s_starts_from_its_weights_and_keeps_what_is_frozen(config, tmp_path):
    from fastris.nn import FCN8s

    source = FCN8s(channels=21, fc_channels=8)
    weights = {name: tensor for name, tensor in source.state_dict().items() if name not in ("mean", "std")}
    torch.save(weights, tmp_path / "fcn8s.pth")
    stages = ["conv1", "conv2", "conv3", "conv4", "conv5", "fc6"]
    config = config.updated(
        {
            "max_steps": 1, "validate_every": 1, "validation_crops": 1, "warmup": 0, "frozen": stages,
            "backbone_weights": str(tmp_path / "fcn8s.pth"), "ema": 0.9,
            "model": {"backbone": "fcn8s", "fc_channels": 8, "mask_head": "inhibition", "padding": "same"},
        }
    )  # fmt: skip
    trainer = Trainer(config, tmp_path / "run")
    trainer.run()
    for name, tensor in trainer.model.backbone.state_dict().items():
        if name.split(".")[0].split("_")[0] in stages and name != "conv1_1.weight":
            assert torch.equal(tensor, weights[name]), name
    assert not torch.equal(trainer.model.backbone.fc7.weight, weights["fc7.weight"])
    (tmp_path / "fcn8s.pth").unlink()
    resumed = Trainer(config.updated({"max_steps": 2}), tmp_path / "run", resume=True)
    assert torch.equal(resumed.model.backbone.fc7.weight, trainer.model.backbone.fc7.weight)
    from fastris.loading import read_metadata

    assert read_metadata(tmp_path / "run" / "model.safetensors")["training"]["backbone_weights"] == "fcn8s.pth"
