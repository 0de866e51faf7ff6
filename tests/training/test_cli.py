"""``fastris train``: where settings come from, exit codes, and no half-done runs."""

from __future__ import annotations

import pytest

from fastris.cli import build_parser, main
from fastris.training.cli import settings


def parse(*arguments: object):
    return settings(build_parser("train").parse_args(["train", *map(str, arguments)]))


@pytest.fixture
def file(write_settings):
    return write_settings()


def test_options_win_over_the_file_and_the_file_over_the_preset(file):
    config = parse("--preset", "nuclei", "--config", file, "--max-steps", 9, "--model.layers", 3, "--seed", 4)
    assert (config.max_steps, config.model.layers, config.seed) == (9, 3, 4)  # options
    assert (config.crop, config.model.hidden_channels) == ((32, 32), 8)  # file
    assert config.precision == "auto"  # preset


def test_options_read_lists_switches_and_sizes():
    config = parse(
        *("--crop", "32,48", "--stage-limit", "0.25,1", "--per-instance", "false"),
        *("--model.confidence-pool", 0, "--model.confidence-map", "12x8"),
    )
    assert (config.crop, config.stage_limit, config.per_instance) == ((32, 48), (0.25, 1.0), False)
    assert config.model.confidence_map == (12, 8)


def test_options_read_names_and_image_sizes():
    config = parse("--preset", "paper-person", "--frozen", "conv1,fc6", "--image-size", "300x200")
    assert (config.frozen, config.image_size) == (("conv1", "fc6"), (300, 200))
    assert parse("--preset", "released-person", "--frozen", "").frozen == ()


def test_a_preset_says_what_it_departs_from(tmp_path, file, capsys):
    run = ["--config", str(file), "--max-steps", "2"]
    assert main(["train", "--preset", "nuclei", *run, "--out", str(tmp_path / "run")]) == 0
    error = capsys.readouterr().err
    assert "this run departs from the paper (preset paper-plants) in:" in error
    lines = [line.split() for line in error.splitlines()]
    assert ["place_weight", "0.3", "0.0"] in lines and ["model.backbone", "small", "plants"] in lines
    main(["train", *run, "--out", str(tmp_path / "run"), "--resume"])
    main(["train", *run, "--out", str(tmp_path / "other")])
    assert "departs" not in capsys.readouterr().err  # said once, and of presets


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-steps", "many"], "argument --max-steps: invalid int value: 'many'"),
        (["--crop", "a,b"], "argument --crop: invalid list of numbers value: 'a,b'"),
        (["--image-size", "big"], "argument --image-size: invalid size HxW value: 'big'"),
        (["--per-instance", "maybe"], "argument --per-instance: invalid bool value: 'maybe'"),
        (["--preset", "nothing"], "argument --preset: invalid choice: 'nothing'"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        parse(*arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_a_run_then_resume_then_a_setting_that_differs(tmp_path, file, capsys):
    out = tmp_path / "run"
    base = ["train", "--config", str(file), "--out", str(out)]
    assert main(base) == 0
    assert capsys.readouterr().out == f"wrote {out / 'model.safetensors'}\n"
    assert main(base) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert main(["train", "--out", str(out), "--resume", "--max-steps", "8"]) == 0
    assert (out / "checkpoints" / "step-00000008").is_dir()
    capsys.readouterr()
    assert main(["train", "--out", str(out), "--resume", "--learning-rate", "0.5"]) == 2
    assert "--resume: learning_rate of this run is 0.001, not 0.5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "absent"], "absent: no such file or folder"),
        (["--config", "absent.toml"], "absent.toml: cannot read"),
        (["--crop", "64"], "crop: expected 2 positive numbers"),
        (["--resume"], "no checkpoint to resume from"),
        (["--device", "cuda:99"], "--device cuda:99: cannot be used here"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, tmp_path, capsys):
    assert main(["train", "--out", str(tmp_path / "run"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_diverging_run_is_one_line_and_exit_code_1(tmp_path, file, capsys, monkeypatch):
    import torch

    from fastris.training import Trainer

    monkeypatch.setattr(Trainer, "_limit_gradients", lambda self: torch.tensor(float("nan")))
    assert main(["train", "--config", str(file), "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("fastris: error: the loss is not finite") and "there is no checkpoint yet" in error


def test_a_broken_image_is_named_before_the_first_step(tmp_path, capsys):
    from PIL import Image

    for name in ("a", "b", "c"):
        for kind in ("rgb", "label"):
            Image.new("L", (32, 32)).save(tmp_path / f"{name}_{kind}.png")
    (tmp_path / "b_rgb.png").write_bytes(b"not an image")
    assert main(["train", "--data", str(tmp_path), "--out", str(tmp_path / "run")]) == 2
    assert "b_rgb.png: not an image" in capsys.readouterr().err
