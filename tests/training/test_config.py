"""Settings: where they come from and what is refused."""

from __future__ import annotations

import pytest

from fastris import InputError, ModelConfig
from fastris.training import PRESETS, TrainConfig
from fastris.training.config import read_config


def test_a_configuration_survives_json():
    import json

    config = TrainConfig(instances=(2, 5, 9), crop=(32, 64, 96), batch_size=(4, 2, 1), stage_limit=(0.1, 0.5, 1.0))
    config = config.updated({"model": {"hidden_channels": 8, "confidence_pool": 0, "confidence_map": [16, 16]}})
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid(name):
    assert isinstance(TrainConfig().updated(PRESETS[name]).model, ModelConfig)


def test_whole_numbers_and_lists_of_a_toml_file_become_what_the_settings_are(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("learning_rate = 1\nstage_limit = [0.5, 1]\n[model]\nbackbone_channels = [8, 8, 16, 16]\n")
    config = TrainConfig().updated(read_config(path))
    assert config.learning_rate == 1.0 and isinstance(config.learning_rate, float)
    assert config.stage_limit == (0.5, 1.0)
    assert config.model.backbone_channels == (8, 8, 16, 16)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rat": 1.0}, "learning_rat: unknown setting"),
        ({"model": {"channels": 3}}, "model.channels: unknown setting"),
        ({"model": 3}, "model: expected a table"),
        ({"max_steps": 1.5}, "max_steps: expected int, got 1.5"),
        ({"max_steps": True}, "max_steps: expected int, got True"),
        ({"max_steps": 0}, "max_steps: expected a positive number, got 0"),
        ({"crop": 64}, "crop: expected a list of numbers, got 64"),
        ({"crop": [64, "128"]}, "crop: expected int, got '128'"),
        ({"crop": [64]}, "crop: expected 2 positive numbers, one a stage"),
        ({"instances": []}, "instances: expected 1 positive numbers"),
        ({"stage_limit": [1.0, 0.5]}, "stage_limit: expected shares that rise to 1"),
        ({"loss_variant": "last"}, "loss_variant: expected all or first_n, got 'last'"),
        ({"precision": "fp8"}, "precision: expected fp32 or bf16, got 'fp8'"),
        ({"grey_probability": 2.0}, "grey_probability: expected a number from 0 to 1"),
        ({"seed": -1}, "seed: expected a number from 0"),
    ],
)
def test_a_bad_setting_is_named(values, message):
    with pytest.raises(InputError, match=message.replace("[", r"\[").replace("(", r"\(")):
        TrainConfig().updated(values)


@pytest.mark.parametrize("content", [b"max_steps = ", b"\xff\xfe"])
def test_a_broken_toml_file_is_named(tmp_path, content):
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    with pytest.raises(InputError, match="broken.toml: not a TOML file"):
        read_config(path)


def test_a_missing_toml_file_is_named(tmp_path):
    with pytest.raises(InputError, match="absent.toml: cannot read"):
        read_config(tmp_path / "absent.toml")
