"""The curves of a training run: what is drawn is what the logs say, and bad logs are named."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastris.errors import InputError
from fastris.viz import save_training_curves, training_curves

STEPS = 300
TRAIN = "step,stage,loss,mask,learning_rate"
VALIDATION = "step,stage,loss,sbd,dic,map"


def run(folder: Path, train: list[str] | None = None, validation: list[str] | None = None) -> Path:
    """A run of two stages, 100 and 200 steps, validated every 50."""
    if train is None:
        train = [f"{step},{1 + (step > 100)},{10 - step % 7},0,{step / 1e5}" for step in range(1, STEPS + 1)]
    if validation is None:
        validation = [f"{step},{1 + (step > 100)},{step},{step / 400},{step / 100},0" for step in range(50, 301, 50)]
    (folder / "train.csv").write_text("\n".join([TRAIN, *train]) + "\n")
    (folder / "validation.csv").write_text("\n".join([VALIDATION, *validation]) + "\n")
    return folder


def test_every_curve_is_what_the_log_says(tmp_path: Path) -> None:
    loss, sbd, rate, dic = training_curves(run(tmp_path)).axes
    assert [axes.get_title(loc="left") for axes in (loss, sbd, rate, dic)] == [
        "loss",
        "SBD, validation",
        "learning rate",
        "|DiC|, validation",
    ]
    steps, values = rate.lines[0].get_data()
    np.testing.assert_array_equal(steps, np.arange(1, STEPS + 1))
    np.testing.assert_allclose(values, steps / 1e5)
    for axes, number, scale in ((loss, 2, 1), (sbd, 0, 400), (dic, 0, 100)):
        first, second = (axes.lines[number + k].get_data() for k in range(2))  # a line a stage
        np.testing.assert_array_equal(first, [[50, 100], [50 / scale, 100 / scale]])
        np.testing.assert_allclose(second, [[150, 200, 250, 300], np.array([150, 200, 250, 300]) / scale])


def test_the_training_loss_is_a_mean_over_a_hundredth_of_the_run_within_a_stage(tmp_path: Path) -> None:
    loss = training_curves(run(tmp_path)).axes[0]
    values = 10 - np.arange(1, STEPS + 1) % 7
    for line, start, end in ((loss.lines[0], 0, 100), (loss.lines[1], 100, STEPS)):
        steps, means = line.get_data()
        np.testing.assert_array_equal(steps, np.arange(start + 1, end + 1))
        for k in (start, start + 1, start + 50, end - 1):
            assert means[k - start] == pytest.approx(values[max(start, k - 2) : k + 1].mean())
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["training", "validation"]


def test_stages_are_marked_where_they_begin(tmp_path: Path) -> None:
    figure = training_curves(run(tmp_path))
    for axes in figure.axes:
        assert [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "--"] == [101]
    assert [text.get_text() for text in figure.axes[1].texts] == ["stage 2"]
    one = training_curves(run(tmp_path, train=[f"{step},1,0.5,0,0.1" for step in range(1, 9)]))
    assert not one.axes[1].texts


def test_a_run_that_has_just_begun_or_was_killed_while_writing_is_drawn(tmp_path: Path) -> None:
    run(tmp_path, train=["1,1,0.5,0,0.1", "2,1,0.4"], validation=[])
    loss = training_curves(tmp_path).axes[0]
    np.testing.assert_allclose(loss.lines[0].get_data(), [[1], [0.5]])
    save_training_curves(tmp_path, tmp_path / "curves.png")


def test_the_picture_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = run(tmp_path) / "curves.png"
    save_training_curves(tmp_path, path)
    with Image.open(path) as picture:
        assert picture.size == (1100, 660)
        assert len(np.unique(np.asarray(picture).reshape(-1, 4), axis=0)) > 10
    before = path.read_bytes()

    def broken(self: object, target: Path, **_: object) -> None:
        Path(target).write_bytes(before[:100])
        raise OSError("disk full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", broken)
    with pytest.raises(OSError, match="disk full"):
        save_training_curves(tmp_path, path)
    assert path.read_bytes() == before
    assert {file.name for file in tmp_path.iterdir()} == {"train.csv", "validation.csv", "curves.png"}


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("train.csv", None, "no such file; expected the folder of a training run"),
        ("validation.csv", None, "no such file"),
        ("train.csv", "", "no column step"),
        ("train.csv", "step,stage,loss\n1,1,0.5\n", "no column learning_rate"),
        ("train.csv", TRAIN + "\n", "no steps to draw yet"),
        ("train.csv", TRAIN + "\n1,1,much,0,0.1\n", "damaged: expected 5 numbers a line"),
        ("validation.csv", VALIDATION + "\n1,1,0\n2,1,0,0,0,0\n", "damaged: expected 6 numbers"),
        ("train.csv", b"\xff\xfe\x00", "cannot read"),
    ],
)
def test_a_log_that_cannot_be_drawn_is_named(
    tmp_path: Path, file: str, content: str | bytes | None, message: str
) -> None:
    run(tmp_path)
    path = tmp_path / file
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as caught:
        training_curves(tmp_path)
    assert str(caught.value).startswith(str(path))


def test_without_matplotlib_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=r"fastris\[curves\]"):
        training_curves(run(tmp_path))
