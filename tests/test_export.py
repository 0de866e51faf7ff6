"""Exported graphs find what the model finds, at sizes that they were not traced with."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastris
from fastris import InputError, ModelConfig, RecurrentInstanceSegmenter
from fastris.cli import main
from fastris.commands.demo import sample_pairs
from fastris.export import Features, Step, export_features, export_onnx, export_step
from fastris.imageio import read_image
from fastris.loading import save
from fastris.nn.config import PLAIN

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "deployment.md"
NATIVE = {"fastris.conv2d_same.default", "fastris.lstm_gates.default"}
DYNAMIC = {"fastris.place_logits.default", "fastris.dynamic_mask.default"}
TINY = {"feature_channels": 8, "backbone_channels": (8, 8, 8, 8), "hidden_channels": 8}
MODELS = {
    "dynamic": {"layers": 2},
    "inhibition": {"mask_head": "inhibition"},
    "plants": {"mask_head": "inhibition", "backbone": "plants", "mask_threshold": 0.9},
    "plain": PLAIN,
    "fine": {"recurrent_stride": 2, "feedback": False, "layers": 1, "confidence_pool": 3},
}


def tiny(**changes: Any) -> RecurrentInstanceSegmenter:
    return RecurrentInstanceSegmenter(ModelConfig(**TINY, **changes)).eval()


def document_code() -> list[str]:
    return re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)


def operators(program: torch.export.ExportedProgram) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if str(node.target).startswith("fastris")}


def random_state(context: tuple[torch.Tensor, ...], config: ModelConfig) -> tuple[torch.Tensor, ...]:
    batch, _, height, width = context[0].shape
    layers = torch.rand(2, config.layers, batch, config.hidden_channels, height, width)
    return layers[0], layers[1], torch.rand(batch, 2, height, width)


@pytest.mark.parametrize(
    ("name", "backend"),
    [(name, "reference" if name == "inhibition" else "native") for name in MODELS],
)
def test_programs_compute_what_the_model_does_for_any_batch_and_size(name, backend):
    if backend == "native" and not fastris.backend.has_native("conv2d_same", "cpu"):
        pytest.skip("no compiled operators here")
    model = tiny(**MODELS[name])
    with fastris.use_backend(backend), torch.no_grad():
        features, step = export_features(model), export_step(model)
        expected = set(NATIVE)
        if model.config.mask_head == "dynamic":
            expected = NATIVE | DYNAMIC | ({"fastris.look.default"} if model.config.hard_place else set())
        expected |= {"fastris.group_norm_relu.default"} if model.config.backbone == "small" else set()
        assert operators(features) | operators(step) == (expected if backend == "native" else set())
        run_features, run_step = features.module(), step.module()
        for shape in ((1, 3, 17, 40), (3, 3, 64, 33)):
            images = torch.rand(shape)
            context = run_features(images)
            torch.testing.assert_close(context, Features(model)(images))
            state = random_state(context, model.config)
            torch.testing.assert_close(run_step(*context, *state), Step(model)(*context, *state))


def test_a_step_is_the_models_own():
    model = tiny()
    images = torch.rand(2, 3, 32, 48)
    with torch.no_grad():
        context = Features(model)(images)
        state = tuple(torch.zeros_like(part) for part in random_state(context, model.config))
        scores, masks = [], []
        for _ in range(3):
            score, mask, *state = Step(model)(*context, *state)
            scores.append(score)
            masks.append(mask)
        output = model(images, 3)
    torch.testing.assert_close(torch.stack(scores, 1), output.scores)
    size = torch.nn.functional.interpolate(output.mask_logits, scale_factor=output.stride, mode="bilinear")
    torch.testing.assert_close(torch.stack(masks, 1), size.sigmoid())


def test_an_unpooled_confidence_head_exports_for_its_own_size_of_map():
    model = tiny(confidence_pool=0, confidence_map=(8, 12))
    with torch.no_grad():
        context = export_features(model).module()(torch.rand(1, 3, 32, 48))
        state = random_state(context, model.config)
        torch.testing.assert_close(export_step(model).module()(*context, *state), Step(model)(*context, *state))


def test_an_fcn8s_exports_for_one_size_of_image():
    model = tiny(backbone="fcn8s", mask_head="inhibition", fc_channels=16)
    with pytest.raises(InputError, match="size: an FCN-8s exports for images of one size"):
        export_features(model)
    with torch.no_grad():
        images = torch.rand(3, 3, 40, 56)
        context = export_features(model, (40, 56)).module()(images)
        torch.testing.assert_close(context, Features(model)(images))
        state = random_state(context, model.config)
        found = export_step(model, (40, 56)).module()(*context, *state)
        torch.testing.assert_close(found, Step(model)(*context, *state))
        zeros = [torch.zeros_like(part) for part in state]
        logits = torch.nn.functional.interpolate(model(images, 1).mask_logits, scale_factor=8, mode="bilinear")
        offset = model.backbone.offset
        expected = logits[:, 0, offset : offset + 40, offset : offset + 56].sigmoid()
        torch.testing.assert_close(Step(model)(*context, *zeros)[1][:, :40, :56], expected)


def test_the_documents_programs_can_be_saved_and_loaded(tmp_path):
    names: dict[str, Any] = {}
    exec(document_code()[1], names)
    images = torch.rand(1, 3, 40, 24)
    for name, program in (("features", names["features"]), ("step", names["step"])):
        torch.export.save(program, tmp_path / f"{name}.pt2")
    features, step = (torch.export.load(tmp_path / f"{name}.pt2").module() for name in ("features", "step"))
    with torch.no_grad():
        context = features(images)
        torch.testing.assert_close(context, Features(names["model"])(images))
        state = random_state(context, names["model"].config)
        torch.testing.assert_close(step(*context, *state), Step(names["model"])(*context, *state))


Find = Callable[[Path, np.ndarray], tuple[np.ndarray, np.ndarray]]


@pytest.fixture(scope="module")
def find() -> Find:
    """The loop of the document."""
    pytest.importorskip("onnxruntime")
    names: dict[str, Any] = {}
    exec(document_code()[0], names)
    return names["find"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxscript")
    folder = tmp_path_factory.mktemp("exported")
    assert main(["export", "--weights", "nuclei", "--out", str(folder)]) == 0
    return folder


def test_onnx_finds_what_predict_finds(exported, find):
    """Each of many steps amplifies the rounding of those before; a loop that is wrong differs in whole objects."""
    model = fastris.load("nuclei")
    total = 0
    image = read_image(sample_pairs()[0][0])
    for height, width in ((256, 256), (100, 75), (33, 160), (16, 9)):
        part = np.ascontiguousarray(image[:height, :width])
        masks, scores = find(exported, part)
        expected = model.predict(part)
        assert masks.shape == expected.masks.shape
        assert (masks != expected.masks).mean() <= 1e-4 if masks.size else True
        np.testing.assert_allclose(scores, expected.scores, atol=1e-3)
        total += len(masks)
    assert total > 10


def test_a_step_in_onnxruntime_is_as_exact_as_eager(exported):
    """Its error against fp64 is at most twice that of torch's own operators in fp32."""
    import onnxruntime

    step = onnxruntime.InferenceSession(exported / "step.onnx")
    names = [one.name for one in step.get_inputs()]
    model = fastris.load("nuclei")
    with fastris.use_backend("reference"), torch.no_grad():
        context = Features(model)(torch.rand(16, 3, 48, 80))  # of two scores one may be right to the last bit
        inputs = (*context, *random_state(context, model.config))
        eager = Step(model)(*inputs)
        exact = Step(model.double())(*(tensor.double() for tensor in inputs))
    outputs = step.run(None, {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)})
    for output, ours, truth in zip(outputs, eager, exact, strict=True):
        error, own = ((torch.as_tensor(one) - truth).norm() for one in (output, ours))
        assert error <= 2 * own


def test_the_json_describes_the_graphs_and_the_loop(exported):
    import onnx
    import onnxruntime

    description = json.loads((exported / "model.json").read_text())
    for file, graph in description["graphs"].items():
        assert {node.domain for node in onnx.load(exported / file).graph.node} == {""}
        session = onnxruntime.InferenceSession(exported / file)
        for values, shapes in ((session.get_inputs(), graph["inputs"]), (session.get_outputs(), graph["outputs"])):
            assert {one.name: one.shape for one in values} == shapes
            assert {one.type for one in values} == {"tensor(float)"}
    assert description["graphs"]["features.onnx"]["inputs"] == {"images": ["batch", 3, "height", "width"]}
    assert description["graphs"]["step.onnx"]["inputs"]["hidden"] == [1, "batch", 32, "rows", "columns"]
    assert description["loop"]["threshold"] == 0.5 and description["loop"]["max_steps"] == 60
    assert ModelConfig.from_dict(description["model"]) == fastris.load("nuclei").config


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plants", "fine"])
def test_other_architectures_export_to_onnx(name, tmp_path, find):
    model = tiny(**MODELS[name], max_steps=3)
    torch.nn.init.constant_(model.confidence_head.linear.bias, 5.0)
    export_onnx(model, tmp_path)
    image = (np.random.default_rng(0).random((40, 70, 3)) * 255).astype(np.uint8)
    masks, scores = find(tmp_path, image)
    expected = model.predict(image)
    assert len(scores) == len(expected)
    assert (masks == expected.masks).all()
    np.testing.assert_allclose(scores, expected.scores, rtol=1e-5)


def test_one_size_of_image_can_be_asked_for(tmp_path):
    pytest.importorskip("onnxscript")
    save(tmp_path / "tiny.safetensors", tiny(layers=1, feedback=False))
    argv = ["export", "--weights", str(tmp_path / "tiny.safetensors"), "--out", str(tmp_path), "--size", "32x48"]
    assert main(argv) == 0
    graphs = json.loads((tmp_path / "model.json").read_text())["graphs"]
    assert graphs["features.onnx"]["inputs"] == {"images": ["batch", 3, 32, 48]}
    assert graphs["step.onnx"]["outputs"]["mask"] == ["batch", 32, 48]


def test_without_onnx_the_remedy_is_named_and_nothing_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert main(["export", "--out", str(tmp_path / "out")]) == 2
    assert "pip install 'fastris[onnx]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--weights", "absent"], "absent: no such model file"), (["--out", "file/out"], "file/out: cannot write")],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert main(["export", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
