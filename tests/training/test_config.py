"""Settings: where they come from and what is refused."""

from __future__ import annotations

import pytest

from fastris import InputError, ModelConfig
from fastris.training import PRESETS, TrainConfig
from fastris.training.config import departures, read_config


def test_a_configuration_survives_json():
    import json

    config = TrainConfig(instances=(2, 5, 9), crop=(32, 64, 96), batch_size=(4, 2, 1), stage_limit=(0.1, 0.5, 1.0))
    config = config.updated({"model": {"hidden_channels": 8, "confidence_pool": 0, "confidence_map": [16, 16]}})
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid(name):
    assert isinstance(TrainConfig().updated(PRESETS[name]).model, ModelConfig)


def test_the_papers_presets_have_its_values():
    plants, person = (TrainConfig().updated(PRESETS[f"paper-{name}"]) for name in ("plants", "person"))
    for config in (plants, person):
        assert (config.instances[0], config.instances[-1], config.growth > 0) == (2, 0, True)  # two, growing, all
        assert (config.batch_size, config.extra_steps, config.gradient_clamp) == ((1, 1, 1), 2, 5.0)
        assert (config.gradient_norm, config.decay, config.warmup, config.jitter) == (0.0, False, 0, 0.0)
        assert (config.loss_variant, config.confidence_weight, config.place_weight) == ("all", 1.0, 0.0)
        assert not config.per_instance and not config.vertical_flip
        model = config.model
        assert (model.mask_head, model.layers, model.kernel_size, model.feedback) == ("inhibition", 2, 3, False)
        assert (model.initialization, model.inhibition_init, model.mask_threshold) == ("released", 1.0, 0.5)
    assert (plants.learning_rate, plants.rotation, plants.image_size) == (1e-4, 180.0, (530, 500))
    assert (plants.model.backbone, plants.model.feature_channels, plants.model.hidden_channels) == ("plants", 30, 30)
    assert (plants.model.confidence_pool, plants.model.confidence_map) == (0, (106, 100))
    assert (person.learning_rate, person.rotation, person.image_size) == (1e-5, 22.5, (500, 500))
    assert (person.model.backbone, person.model.feature_channels, person.model.hidden_channels) == ("fcn8s", 100, 100)
    assert (person.model.confidence_pool, person.model.padding, person.model.dropout) == (2, "100", 0.5)


def test_what_departs_from_the_paper_is_listed():
    def of(preset, **changes):
        return departures(TrainConfig().updated(PRESETS[preset]).updated(changes))

    assert of("paper-plants") == ("paper-plants", []) and of("paper-person") == ("paper-person", [])
    assert of("paper-plants", seed=3, data="leaves:9", max_steps=7, crop=(9, 9, 9))[1] == []  # it says nothing of these
    assert of("paper-plants", data_class="person", workers=2)[1] == []
    assert of("paper-plants", batch_size=(4, 4, 4))[1] == [("batch_size", (4, 4, 4), (1, 1, 1))]
    released = [("extra_steps", 1, 2), ("loss_variant", "first_n", "all"), ("model.mask_threshold", 0.9, 0.5)]
    assert of("released-plants") == (
        "paper-plants",
        [*released[:2], ("loss_resolution", "map", "image"), *released[2:]],
    )
    paper, rows = of("released-person")
    assert paper == "paper-person" and set(released) < set(rows)
    assert ("frozen", ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7"), ()) in rows
    paper, rows = of("nuclei")
    assert (
        paper == "paper-plants" and ("place_weight", 0.3, 0.0) in rows and ("model.backbone", "small", "plants") in rows
    )


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
        ({"loss_resolution": "half"}, "loss_resolution: expected image or map"),
        ({"precision": "fp8"}, "precision: expected fp32 or bf16 or auto, got 'fp8'"),
        ({"grey_probability": 2.0}, "grey_probability: expected a number from 0 to 1"),
        ({"place_weight": 0.0}, "place_weight: must be above 0 with model.hard_place"),
        ({"seed": -1}, "seed: expected a number from 0"),
        ({"instances": [0, 2]}, "instances: expected 2 positive numbers"),
        ({"zoom": 0.9}, "zoom: expected a factor from 1"),
        ({"rotation": 181.0}, "rotation: expected at most 180 degrees"),
        ({"image_size": [32]}, "image_size: expected a height and a width"),
        ({"backbone_weights": "vgg16.pth"}, "backbone_weights: only for model.backbone 'fcn8s', not 'small'"),
        ({"frozen": ["conv1"]}, "frozen: only for model.backbone 'fcn8s'"),
        ({"frozen": ["conv9"], "model": {"backbone": "fcn8s"}}, "frozen: expected names of conv1, .*, got conv9"),
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
