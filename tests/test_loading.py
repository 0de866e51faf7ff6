"""Model files: what was saved comes back, and a bad file is named."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastris
from fastris import InputError, ModelConfig, RecurrentInstanceSegmenter
from fastris.loading import read_metadata
from fastris.nn.config import PLAIN

TINY = {"feature_channels": 8, "backbone_channels": (8, 8, 8, 8), "hidden_channels": 8}


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = RecurrentInstanceSegmenter(ModelConfig(**TINY))
    path = tmp_path / "model.safetensors"
    fastris.save(path, model, {"seed": 3})
    return model, path


def rewrite(path, change):
    """Change the tensors of a model file and keep its header."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    change(tensors, header)
    save_file(tensors, path, header)


def test_what_was_saved_comes_back(saved):
    model, path = saved
    loaded = fastris.load(path)
    assert loaded.config == model.config and not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    assert read_metadata(path) == {"seed": 3}


def test_a_file_from_before_a_setting_is_what_it_was(tmp_path):
    path = tmp_path / "old.safetensors"
    fastris.save(path, RecurrentInstanceSegmenter(ModelConfig(**TINY, **PLAIN)))

    def forget(_, header):
        content = json.loads(header["fastris"])
        for name in PLAIN:
            del content["config"][name]
        header["fastris"] = json.dumps(content)

    rewrite(path, forget)
    assert fastris.load(path).config == ModelConfig(**TINY, **PLAIN)


def test_nothing_is_left_beside_the_file(saved):
    _, path = saved
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_weights_that_are_not_finite_are_refused(saved):
    _, path = saved
    rewrite(path, lambda tensors, _: tensors["confidence_head.linear.bias"].fill_(float("nan")))
    with pytest.raises(
        InputError, match=r"model\.safetensors: weights are not finite .* confidence_head\.linear\.bias"
    ):
        fastris.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, _: tensors.pop("confidence_head.linear.bias"), "another architecture: lacks"),
        (lambda tensors, _: tensors.update(extra=torch.zeros(1)), "another architecture: has unknown extra"),
        (
            lambda tensors, _: tensors.update({"confidence_head.linear.bias": torch.zeros(2)}),
            "other shapes for",
        ),
        (
            lambda _, header: header.update(fastris=json.dumps({"config": {"what": 1}, "metadata": {}})),
            "unknown what",
        ),
        (lambda _, header: header.pop("fastris"), "not a fastris model"),
    ],
)
def test_another_architecture_is_refused(saved, change, message):
    _, path = saved
    rewrite(path, change)
    with pytest.raises(InputError, match=rf"model\.safetensors: .*{message}"):
        fastris.load(path)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\xff" * 64])
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"broken\.safetensors: damaged"):
        fastris.load(path)


def test_a_truncated_file_is_named(saved):
    _, path = saved
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors: damaged"):
        fastris.load(path)


def test_an_unknown_name_lists_what_is_shipped():
    with pytest.raises(InputError, match="no such model file; shipped models"):
        fastris.load("giraffes")


def test_an_unwritable_folder_is_named(tmp_path, saved):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write here"):
        fastris.save(tmp_path / "file" / "model.safetensors", saved[0])
