"""The command line: what it writes, and one line and exit code 2 for every kind of bad input."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastris
from fastris.cli import main
from fastris.commands.evaluate import spread
from fastris.commands.predict import expand, output_stems
from fastris.imageio import read_label_map, write_label_map
from fastris.instances import Instances
from fastris.loading import save
from fastris.nn import ModelConfig, RecurrentInstanceSegmenter

SMALL = ModelConfig(feature_channels=8, backbone_channels=(8, 8, 16, 16), hidden_channels=8, layers=1, max_steps=3)


def two_boxes(self: object, image: Any, max_steps: int | None = None, **_: object) -> Instances:
    """A stand-in for a trained model: two rectangles that overlap in a quarter of the image."""
    array = np.asarray(image)
    height, width = array.shape[:2] if array.shape[-1] == 3 else array.shape[-2:]
    masks = np.zeros((2, height, width), bool)
    masks[0, : -(-height * 3 // 4), : -(-width * 3 // 4)] = True
    masks[1, height // 2 :, width // 2 :] = True
    count = min(2, max_steps or 2)
    return Instances(masks[:count], np.array([0.9, 0.75])[:count], (height, width))


@pytest.fixture
def finder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RecurrentInstanceSegmenter, "predict", two_boxes)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    model = RecurrentInstanceSegmenter(SMALL)
    with torch.no_grad():
        model.confidence_head.linear.bias.fill_(5.0)  # sure of an object at every step
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save(path, model)
    return str(path)


def picture(path: Path, shape: tuple[int, ...] = (32, 40, 3), dtype: type = np.uint8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    top = np.iinfo(dtype).max
    values = np.random.default_rng(0).integers(0, top, shape, dtype=dtype, endpoint=True)
    Image.fromarray(values).save(path)
    return path


def truncated(path: Path) -> Path:
    path.write_bytes(picture(path).read_bytes()[:500])
    return path


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]


def errors(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines on stderr, all of which must be errors."""
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("fastris: error: ") for line in lines), lines
    return lines


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, fastris.cli\n"
        "try: fastris.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'numpy', 'PIL'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"
    for command in ("demo", "train", "curves", "predict", "evaluate", "export", "info"):
        assert command in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"fastris {fastris.__version__}\n"


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["unknown"],
        ["predict", "--threshold", "2", "a.png"],
        ["predict", "--max-steps", "0", "a.png"],
        ["predict", "--backend", "other", "a.png"],
        ["evaluate"],
        ["evaluate", "--data", "leaves", "--size", "1x2x3"],
        ["evaluate", "--data", "leaves", "--figure", "0"],
        ["evaluate", "--data", "leaves", "--figure", "many"],
        ["curves"],
    ],
)
def test_wrong_options_exit_with_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2


def test_a_wrong_backend_in_the_environment_is_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastris", "info"],
        capture_output=True,
        text=True,
        env={**os.environ, "FASTRIS_BACKEND": "other"},
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "FASTRIS_BACKEND" in line


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    assert "assignment" in capsys.readouterr().out


@pytest.mark.usefixtures("finder")
def test_predict_writes_everything(tmp_path: Path, weights: str) -> None:
    image = picture(tmp_path / "in" / "cells.png")
    out = tmp_path / "deep" / "out"
    assert main(["predict", str(image), "--weights", weights, "--out", str(out), "--coco"]) == 0
    assert {path.name for path in out.iterdir()} == {
        "cells_label.png",
        "cells_overlay.png",
        "predictions.jsonl",
        "predictions.csv",
        "coco.json",
    }
    labels = read_label_map(out / "cells_label.png")
    assert labels.shape == (32, 40)
    assert labels[16, 20] == 1  # where both are, the first found wins
    assert labels[31, 39] == 2

    (row,) = rows(out)
    assert (row["file"], row["count"], row["height"], row["width"]) == (str(image), 2, 32, 40)
    assert row["instances"][1] == {"index": 2, "score": 0.75, "area": 16 * 20, "box": [20, 16, 40, 32]}
    assert (out / row["label"]).exists()
    assert (out / row["overlay"]).exists()

    with (out / "predictions.csv").open(newline="") as file:
        (line,) = csv.DictReader(file)
    assert line == {
        "file": str(image),
        "count": "2",
        "scores": "0.9;0.75",
        "areas": "720;320",
        "boxes": "0 0 30 24;20 16 40 32",
    }

    coco = json.loads((out / "coco.json").read_text())
    assert coco["images"] == [{"id": 1, "file_name": str(image), "height": 32, "width": 40}]
    assert [(one["id"], one["image_id"], one["bbox"]) for one in coco["annotations"]] == [
        (1, 1, [0, 0, 30, 24]),
        (2, 1, [20, 16, 20, 16]),
    ]


@pytest.mark.usefixtures("finder")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_pycocotools_loads_the_coco_file(tmp_path: Path, weights: str) -> None:
    coco_api = pytest.importorskip("pycocotools.coco")
    images = [picture(tmp_path / name) for name in ("a.png", "b.png")]
    assert main(["predict", *map(str, images), "--weights", weights, "--out", str(tmp_path), "--coco"]) == 0
    coco = coco_api.COCO(str(tmp_path / "coco.json"))
    assert [image["file_name"] for image in coco.loadImgs(coco.getImgIds())] == list(map(str, images))
    for image_id in coco.getImgIds():
        masks = [coco.annToMask(one) for one in coco.loadAnns(coco.getAnnIds(image_id))]
        np.testing.assert_array_equal(masks, two_boxes(None, np.zeros((32, 40, 3))).masks)


def test_predict_with_a_real_model(tmp_path: Path, weights: str) -> None:
    image = picture(tmp_path / "a.png", (50, 70, 3))
    out = tmp_path / "out"
    assert main(["predict", str(image), "--weights", weights, "--out", str(out), "--max-steps", "2"]) == 0
    (row,) = rows(out)
    assert row["count"] <= 2
    assert read_label_map(out / "a_label.png").shape == (50, 70)


def test_predict_draws_the_steps_of_each_image(tmp_path: Path, weights: str) -> None:
    from fastris.viz import step_strip

    folder, out = tmp_path / "in", tmp_path / "in"  # into the folder of the images: its pictures are no input
    picture(folder / "a.png", (50, 70, 3))
    argv = ["predict", str(folder), "--weights", weights, "--out", str(out), "--figure", "--max-steps", "2"]
    for _ in range(2):
        assert main([*argv, "--threshold", "0.25"]) == 0
        (row,) = rows(out)
        assert row["steps"] == "a_steps.png"
    image = np.asarray(Image.open(folder / "a.png"))
    expected = step_strip(fastris.load(weights), image, max_steps=2, threshold=0.25, title="a.png")
    np.testing.assert_array_equal(np.asarray(Image.open(out / "a_steps.png")), np.asarray(expected))
    assert not list(out.glob(".*"))


def test_predict_says_once_that_an_image_is_shrunk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "near.safetensors", RecurrentInstanceSegmenter(dataclasses.replace(SMALL, max_side=32)))
    argv = ["predict", str(picture(tmp_path / "a.png", (50, 70, 3))), "--weights", str(tmp_path / "near.safetensors")]
    assert main([*argv, "--out", str(tmp_path / "out"), "--figure"]) == 0
    assert (tmp_path / "out" / "a_steps.png").exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert "70x50 pixels are looked at as 32x22" in line


def test_predict_and_evaluate_in_tiles(tmp_path: Path, weights: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The weights are sure of an object at every step: each of six tiles uses its two steps."""
    image = picture(tmp_path / "a_rgb.png", (50, 70, 3))
    write_label_map(tmp_path / "a_label.png", np.ones((50, 70), np.int32))
    options = [
        "--weights",
        weights,
        "--out",
        str(tmp_path / "out"),
        "--max-steps",
        "2",
        "--tile",
        "32",
        "--overlap",
        "4",
    ]
    assert main(["predict", str(image), *options]) == 0
    (note,) = capsys.readouterr().err.splitlines()
    assert note.startswith(f"fastris: note: {image}: 6 of 6 tiles used all 2 steps")
    (row,) = rows(tmp_path / "out")
    assert row["warnings"] == [note.removeprefix(f"fastris: note: {image}: ")]
    assert (row["height"], row["width"]) == (50, 70)

    assert main(["evaluate", "--data", str(tmp_path), "--split", "all", *options]) == 0
    assert "a: 6 of 6 tiles" in capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "evaluate.json").read_text())
    assert (report["settings"]["tile"], report["settings"]["overlap"]) == (32, 4)


def test_the_steps_of_tiles_are_not_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "a.png", "--tile", "32", "--figure", "--out", str(tmp_path / "out")]) == 2
    (line,) = errors(capsys)
    assert "leave --tile out" in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [["predict", "a.png", "b.png"], ["evaluate", "--data", "leaves:2"]])
def test_tiles_that_cannot_be_stop_before_any_work(
    tmp_path: Path, weights: str, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    for tiles, message in (
        (["--overlap", "8"], "overlap: only tiles overlap"),
        (["--tile", "8", "--overlap", "8"], "overlap: expected 0 to 7"),
        (["--tile", "9999"], "tile: expected 1 to 1024"),
    ):
        assert main([*command, "--weights", weights, "--out", str(tmp_path), *tiles]) == 2
        (line,) = errors(capsys)
        assert message in line


@pytest.mark.usefixtures("finder")
def test_folders_and_globs(tmp_path: Path, weights: str) -> None:
    folder = tmp_path / "in"
    for name in ("b.png", "a.jpg", "c.tif", "c_label.png", "notes.txt"):
        picture(folder / name) if name != "notes.txt" else (folder / name).write_text("no image")
    out = tmp_path / "out"
    assert main(["predict", str(folder), str(folder / "[ab].*"), "--weights", weights, "--out", str(out)]) == 0
    assert [Path(row["file"]).name for row in rows(out)] == ["a.jpg", "b.png", "c.tif"]  # each once


@pytest.mark.usefixtures("finder")
def test_equal_names_from_different_folders_do_not_overwrite_each_other(tmp_path: Path, weights: str) -> None:
    paths = [picture(tmp_path / name) for name in ("one/a.png", "two/a.png", "two/a.jpg", "two/b.png")]
    out = tmp_path / "out"
    assert main(["predict", *map(str, paths), "--weights", weights, "--out", str(out)]) == 0
    labels = [row["label"] for row in rows(out)]
    assert labels == ["one_a_label.png", "two_a_label.png", "two_a-2_label.png", "b_label.png"]
    assert len(list(out.glob("*_label.png"))) == len(list(out.glob("*_overlay.png"))) == 4


def test_output_names_never_collide() -> None:
    paths = [Path(name) for name in ("x/a.png", "y/A.png", "z/x_a.png", "q/x/a.png", "w/x_a-2.png", "z/a.png")]
    stems = output_stems(paths)
    assert len({stem.lower() for stem in stems}) == len(paths)
    assert stems[2] == "x_a"


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path: Path) -> None:
    path = picture(tmp_path / "a[1].png")
    assert expand([str(path)]) == ([path], [])


@pytest.mark.usefixtures("finder")
@pytest.mark.parametrize("bad", ["truncated", "corrupt", "missing", "no match", "empty folder"])
def test_one_bad_input_gives_one_line_and_the_others_are_processed(
    tmp_path: Path, weights: str, capsys: pytest.CaptureFixture[str], bad: str
) -> None:
    good = picture(tmp_path / "good.png"), picture(tmp_path / "last.png")
    path = tmp_path / "bad.png"
    if bad == "truncated":
        truncated(path)
    elif bad == "corrupt":
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(200))
    elif bad == "no match":
        path = tmp_path / "bad*.jpg"
    elif bad == "empty folder":
        path.mkdir()
    out = tmp_path / "out"
    argv = ["predict", str(good[0]), str(path), str(good[1]), "--weights", weights, "--out", str(out)]
    assert main(argv) == 2
    (line,) = errors(capsys)
    assert str(path) in line
    assert [row["file"] for row in rows(out)] == list(map(str, good))
    assert not list(out.glob("bad*"))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((33, 47), np.uint8),
        ((33, 47), np.uint16),
        ((33, 47, 4), np.uint8),
        ((1, 1), np.uint8),
        ((1, 1, 3), np.uint8),
        ((1, 300, 3), np.uint8),
    ],
)
def test_grey_16_bit_rgba_and_tiny_images_are_processed(
    tmp_path: Path, weights: str, shape: tuple[int, ...], dtype: type
) -> None:
    image = picture(tmp_path / "a.png", shape, dtype)
    out = tmp_path / "out"
    assert main(["predict", str(image), "--weights", weights, "--out", str(out)]) == 0
    assert read_label_map(out / "a_label.png").shape == shape[:2]


def test_5000_by_5000_pixels_are_processed(tmp_path: Path, weights: str, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "large.png"
    rows_, columns = np.mgrid[:5000, :5000]
    Image.fromarray(((rows_ // 20 + columns // 20) % 200).astype(np.uint8)).save(image, compress_level=1)
    out = tmp_path / "out"
    assert main(["predict", str(image), "--weights", weights, "--out", str(out)]) == 0
    assert read_label_map(out / "large_label.png").shape == (5000, 5000)
    assert "large.png" in capsys.readouterr().err  # says that the image was looked at in smaller form


def test_nan_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = RecurrentInstanceSegmenter(SMALL)
    with torch.no_grad():
        model.confidence_head.linear.bias.fill_(float("nan"))
    path = tmp_path / "nan.safetensors"
    save(path, model)
    refused(path, tmp_path, capsys)


def test_weights_of_another_architecture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "other.safetensors"
    header = {"config": SMALL.to_dict(), "metadata": {}}
    save_file({"conv.weight": torch.zeros(2, 2)}, path, {"fastris": json.dumps(header)})
    refused(path, tmp_path, capsys)


@pytest.mark.parametrize("content", [None, b"", b"not safetensors at all"])
def test_missing_or_damaged_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None) -> None:
    path = tmp_path / "broken.safetensors"
    if content is not None:
        path.write_bytes(content)
    refused(path, tmp_path, capsys)


def refused(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`predict` and `evaluate` with these weights exit with 2 and one line that names the file."""
    image = picture(tmp_path / "a.png")
    for argv in (["predict", str(image)], ["evaluate", "--data", "leaves:2", "--split", "all"]):
        assert main([*argv, "--weights", str(path), "--out", str(tmp_path / "out")]) == 2
        (line,) = errors(capsys)
        assert str(path) in line


@pytest.mark.parametrize("command", [["predict", "missing.png"], ["demo"], ["evaluate", "--data", "leaves:2"]])
def test_an_unwritable_output_directory_stops_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setattr("fastris.loading.load", lambda _: pytest.fail("loaded a model first"))
    monkeypatch.setattr("fastris.commands.demo.sample_pairs", list)
    assert main([*command, "--out", str(blocked / "out")]) == 2
    (line,) = errors(capsys)
    assert str(blocked / "out") in line


def test_coco_without_pycocotools_stops_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    out = tmp_path / "out"
    for command in (["predict", str(picture(tmp_path / "a.png"))], ["evaluate", "--data", "leaves:2"]):
        assert main([*command, "--coco", "--out", str(out)]) == 2
        (line,) = errors(capsys)
        assert "fastris[coco]" in line
        assert not out.exists()


def test_no_input_and_no_such_device(tmp_path: Path, weights: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert main(["predict", "--out", out]) == 2
    assert main(["predict", "a.png", "--out", out, "--weights", weights, "--device", "abacus"]) == 2
    lines = errors(capsys)
    assert len(lines) == 2
    assert "--device abacus" in lines[1]


def test_an_interrupted_run_keeps_what_it_wrote(tmp_path: Path, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def interrupted(self: object, image: Any, **options: Any) -> Instances:
        calls.append(image)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return two_boxes(self, image)

    monkeypatch.setattr(RecurrentInstanceSegmenter, "predict", interrupted)
    paths = [picture(tmp_path / name) for name in ("a.png", "b.png")]
    out = tmp_path / "out"
    assert main(["predict", *map(str, paths), "--weights", weights, "--out", str(out)]) == 1
    assert [row["file"] for row in rows(out)] == [str(paths[0])]


@pytest.mark.usefixtures("finder")
def test_evaluate_writes_metrics_rows_and_settings(
    tmp_path: Path, weights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    argv = ["evaluate", "--data", "leaves:4", "--split", "all", "--seed", "1", "--weights", weights, "--out", str(out)]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    for column in ("SBD", "FBD", "DiC", "|DiC|", "mAP", "AP@0.5", "images", "AP^r", "@0.5", "@0.9", "mean", "vol"):
        assert column in printed.split()
    assert {path.name for path in out.iterdir()} == {"evaluate.json", "evaluate.csv"}
    report = json.loads((out / "evaluate.json").read_text())
    assert report["settings"]["data"] == "leaves:4"
    assert report["settings"]["seed"] == 1
    assert report["metrics"]["images"] == len(report["images"]) == 4
    mean = sum(row["sbd"] for row in report["images"]) / 4
    assert report["metrics"]["sbd"] == pytest.approx(mean)
    assert f"{mean:.3f}" in printed.split()
    assert "coco" not in report
    with (out / "evaluate.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert lines == [{key: str(value) for key, value in row.items()} for row in report["images"]]


@pytest.mark.usefixtures("finder")
def test_evaluate_ranks_whole_masks_by_score(tmp_path: Path, weights: str) -> None:
    """Two rectangles of scores 0.9 and 0.75 that overlap: whole masks count for AP^r and COCO, not the label map."""
    picture(tmp_path / "in" / "a_rgb.png")
    first, second = two_boxes(None, np.zeros((32, 40, 3))).masks
    target = np.where(second, 2, 0)  # the second alone, whole
    write_label_map(tmp_path / "in" / "a_label.png", target)
    out = tmp_path / "out"
    argv = ["evaluate", "--data", str(tmp_path / "in"), "--split", "all", "--weights", weights, "--out", str(out)]
    assert main([*argv, "--coco"]) == 0
    report = json.loads((out / "evaluate.json").read_text())
    assert (first & second).any()
    assert report["metrics"]["apr90"] == pytest.approx(1 / 2)  # wrong, then right
    assert report["coco"]["ap"] == pytest.approx(1 / 2)


@pytest.mark.usefixtures("finder")
def test_evaluate_coco_writes_what_pycocotools_reads(
    tmp_path: Path, weights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    coco = pytest.importorskip("pycocotools.coco").COCO
    labelled(tmp_path / "in", "a")
    labelled(tmp_path / "in", "b")
    out = tmp_path / "out"
    argv = ["evaluate", "--data", str(tmp_path / "in"), "--split", "all", "--weights", weights, "--out", str(out)]
    assert main([*argv, "--coco"]) == 0
    printed = capsys.readouterr().out
    for column in ("COCO", "AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L", "AR1", "AR10", "AR100", "AR_S", "AR_M"):
        assert column in printed.split()
    assert "index created" not in printed
    numbers = json.loads((out / "evaluate.json").read_text())["coco"]
    assert numbers["ap50"] == pytest.approx(1)  # the label map hides a quarter of the second: IoU 0.72 or so
    assert 0 < numbers["ap"] < 1
    assert numbers["ap_large"] is None  # NaN is no JSON
    truth = coco(str(out / "coco-ground-truth.json"))
    found = truth.loadRes(str(out / "coco-results.json"))
    assert [image["file_name"] for image in truth.imgs.values()] == ["a", "b"]
    assert len(truth.anns) == len(found.anns) == 4
    assert [one["score"] for one in found.anns.values()] == [pytest.approx(score) for score in (0.9, 0.75) * 2]


@pytest.mark.parametrize("options", [[], ["2"], ["1"], ["9"]])
def test_evaluate_draws_images_from_the_worst_to_the_best(
    tmp_path: Path, weights: str, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    from fastris.data import open_dataset
    from fastris.viz import FigureRow, figure_panel

    argv = ["evaluate", "--data", "leaves:4", "--split", "all", "--weights", weights, "--max-steps", "3"]
    assert main([*argv, "--out", str(tmp_path), "--figure", *options]) == 0
    assert f"wrote {tmp_path / 'figure.png'}" in capsys.readouterr().out.splitlines()
    scores = {row["name"]: row["sbd"] for row in json.loads((tmp_path / "evaluate.json").read_text())["images"]}
    ordered = sorted(scores, key=lambda name: scores[name])
    titles = {0: "worst", 1: "median", 2: "rank 3", 3: "best"}
    chosen = {"": [0, 1, 3], "2": [0, 3], "1": [1], "9": [0, 1, 2, 3]}["".join(options)]
    samples = {sample.name: sample for sample in open_dataset("leaves:4", "all")}
    model = fastris.load(weights)
    expected = figure_panel(
        [
            FigureRow(
                samples[ordered[rank]].image,
                model.predict(samples[ordered[rank]].image, max_steps=3).label_map(),  # type: ignore[union-attr]
                samples[ordered[rank]].labels.numpy(),
                title=f"SBD {scores[ordered[rank]]:.2f}, {titles[rank]} of 4: {ordered[rank]}",
            )
            for rank in chosen
        ]
    )
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "figure.png")), np.asarray(expected))


def test_a_figure_spans_the_ranks_of_the_scores() -> None:
    scores = [0.5, 0.9, 0.1, 0.5, 0.7]
    assert spread(scores, 3) == [
        (2, "SBD 0.10, worst of 5"),
        (3, "SBD 0.50, median of 5"),
        (1, "SBD 0.90, best of 5"),
    ]
    assert [index for index, _ in spread(scores, 7)] == [2, 0, 3, 4, 1]
    assert spread(scores, 1) == [(3, "SBD 0.50, median of 5")]
    assert [index for index, _ in spread(scores[:1], 3)] == [0]


def test_evaluate_draws_the_right_images_where_one_is_bad(tmp_path: Path, weights: str) -> None:
    from fastris.viz import FigureRow, figure_panel

    for name in ("a", "b", "c"):
        labelled(tmp_path / "in", name)
    truncated(tmp_path / "in" / "a_rgb.png")
    argv = ["evaluate", "--data", str(tmp_path / "in"), "--split", "all", "--weights", weights, "--max-steps", "1"]
    assert main([*argv, "--out", str(tmp_path), "--figure", "1"]) == 2
    image = np.asarray(Image.open(tmp_path / "in" / "b_rgb.png"))
    found = fastris.load(weights).predict(image, max_steps=1).label_map()  # type: ignore[union-attr]
    truth = read_label_map(tmp_path / "in" / "b_label.png")
    (row,) = [row for row in json.loads((tmp_path / "evaluate.json").read_text())["images"] if row["name"] == "b"]
    expected = figure_panel([FigureRow(image, found, truth, title=f"SBD {row['sbd']:.2f}, worst of 2: b")])
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "figure.png")), np.asarray(expected))


def test_curves_are_drawn_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, other = tmp_path / "run", tmp_path / "deep" / "other"
    assert main(["curves", str(run)]) == 2
    (line,) = errors(capsys)
    assert str(run / "train.csv") in line
    run.mkdir()
    (run / "train.csv").write_text("step,stage,loss,learning_rate\n1,1,0.5,0.1\n")
    (run / "validation.csv").write_text("step,stage,loss,sbd,dic\n1,1,0.5,0.6,2\n")
    assert main(["curves", str(run)]) == 0
    assert main(["curves", str(run), "--out", str(other)]) == 0
    assert capsys.readouterr().out == f"wrote {run / 'curves.png'}\nwrote {other / 'curves.png'}\n"
    pictures = [np.asarray(Image.open(folder / "curves.png")) for folder in (run, other)]
    np.testing.assert_array_equal(*pictures)
    assert {path.name for path in run.iterdir()} == {"train.csv", "validation.csv", "curves.png"}


def test_curves_without_matplotlib(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    assert main(["curves", str(tmp_path)]) == 2
    (line,) = errors(capsys)
    assert "fastris[curves]" in line


def labelled(folder: Path, name: str) -> tuple[Path, Path]:
    """An image with the two rectangles that the stand-in finds as its ground truth."""
    image = picture(folder / f"{name}_rgb.png")
    label = folder / f"{name}_label.png"
    write_label_map(label, two_boxes(None, np.zeros((32, 40, 3))).label_map())
    return image, label


@pytest.mark.usefixtures("finder")
@pytest.mark.parametrize("bad", ["mask of another size", "no mask", "truncated image", "truncated mask"])
def test_evaluate_names_the_bad_pair_and_measures_the_others(
    tmp_path: Path, weights: str, capsys: pytest.CaptureFixture[str], bad: str
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    for name in ("a", "c"):
        labelled(folder, name)
    image, label = labelled(folder, "b")
    if bad == "mask of another size":
        write_label_map(label, np.ones((31, 40), np.int32))
    elif bad == "no mask":
        label.unlink()
    else:
        truncated(image if bad == "truncated image" else label)
    argv = ["evaluate", "--data", str(folder), "--split", "all", "--weights", weights, "--out", str(out)]
    assert main(argv) == 2
    (line,) = errors(capsys)
    assert "b_" in line
    report = json.loads((out / "evaluate.json").read_text())
    assert (report["metrics"]["images"], report["failed"], report["metrics"]["sbd"]) == (2, 1, 1.0)


@pytest.mark.usefixtures("finder")
@pytest.mark.parametrize(("data_class", "count"), [(None, 3), ("person", 2), ("bus", 0)])
def test_evaluate_counts_one_class(tmp_path: Path, weights: str, data_class: str | None, count: int) -> None:
    """On Cityscapes with two persons, a car and a group of persons, which is void, in its one image of val."""
    name = "aachen_000000_000000"
    picture(tmp_path / f"leftImg8bit/val/aachen/{name}_leftImg8bit.png")
    ids = np.full((32, 40), 7, np.uint16)
    ids[:4, :4], ids[8:12, :4], ids[16:20, :4], ids[24:] = 24000, 24001, 26000, 24
    folder = tmp_path / "gtFine/val/aachen"
    folder.mkdir(parents=True)
    Image.fromarray(ids).save(folder / f"{name}_gtFine_instanceIds.png")
    out = tmp_path / "out"
    chosen = ["--data-class", data_class] if data_class else []
    assert main(["evaluate", "--data", str(tmp_path), *chosen, "--weights", weights, "--out", str(out)]) == 0
    report = json.loads((out / "evaluate.json").read_text())
    assert report["images"][0]["target_count"] == count
    assert report["settings"]["data_class"] == data_class


def test_evaluate_without_data_names_what_was_given(
    tmp_path: Path, weights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    picture(tmp_path / "images_only" / "a.png")
    (tmp_path / "not.zip").write_text("")
    for data in ("empty", "images_only", "not.zip", "missing"):
        path = str(tmp_path / data)
        argv = ["evaluate", "--data", path, "--split", "all", "--weights", weights, "--out", str(tmp_path / "out")]
        assert main(argv) == 2
        lines = errors(capsys)
        assert lines
        assert path in lines[-1]


@pytest.mark.usefixtures("finder")
def test_demo_writes_the_contact_sheet(
    tmp_path: Path, weights: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [labelled(tmp_path / "samples", name) for name in ("a", "b")]
    monkeypatch.setattr("fastris.commands.demo.sample_pairs", lambda: pairs)
    out = tmp_path / "out"
    assert main(["demo", "--weights", weights, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert str(out / "demo.png") in printed
    for column in ("file", "found", "true", "SBD"):
        assert column in printed
    assert {path.name for path in out.iterdir()} == {"demo.png", "a_label.png", "b_label.png"}
    with Image.open(out / "demo.png") as sheet:
        assert sheet.width > 600
