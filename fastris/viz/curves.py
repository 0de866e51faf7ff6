"""The curves of a training run, drawn with matplotlib from the logs that the run writes."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastris.errors import InputError
from fastris.imageio import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, FAINT = "#0072B2", "#E69F00", "0.55"
WINDOWS = 100  # in a run; the training loss is averaged over one


def training_curves(run: str | os.PathLike[str]) -> Figure:
    """Loss, SBD, \\|DiC\\| and learning rate of a run against its steps, with a line where a stage begins.

    The training loss is drawn as a running mean over a hundredth of the run, within a stage.

    Args:
        run: the folder of ``fastris train``, with ``train.csv`` and ``validation.csv``.

    Raises:
        InputError: matplotlib is not installed; a log is missing, empty or damaged; the message names it.
    """
    figure_class = require_matplotlib()
    run = Path(run)
    train = _read(run / "train.csv", ("step", "stage", "loss", "learning_rate"))
    validation = _read(run / "validation.csv", ("step", "stage", "loss", "sbd", "dic"))
    steps = train["step"]
    if not steps.size:
        raise InputError(f"{run / 'train.csv'}: no steps to draw yet")

    figure = figure_class(figsize=(10, 6), layout="constrained")
    (loss, sbd), (rate, dic) = figure.subplots(2, 2, sharex=True)
    for part in _stages(train):
        loss.plot(
            steps[part], _running_mean(train["loss"][part], max(1, steps.size // WINDOWS)), BLUE, label="training"
        )
    for axes, column in ((loss, "loss"), (sbd, "sbd"), (dic, "dic")):
        for part in _stages(validation):
            axes.plot(
                validation["step"][part], validation[column][part], ORANGE, marker="o", markersize=3, label="validation"
            )
    rate.plot(steps, train["learning_rate"], BLUE)
    rate.yaxis.set_major_formatter("{x:g}")
    names = dict(zip(*reversed(loss.get_legend_handles_labels()), strict=True))  # one of each
    loss.legend(names.values(), names.keys(), frameon=False)
    for axes, title in ((loss, "loss"), (sbd, "SBD, validation"), (rate, "learning rate"), (dic, "|DiC|, validation")):
        axes.set_title(title, loc="left", fontsize=11)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        for part in _stages(train)[1:]:
            axes.axvline(steps[part[0]], color=FAINT, linestyle="--", linewidth=1)
    for part in _stages(train)[1:]:
        sbd.annotate(
            f"stage {train['stage'][part[0]]:.0f}", (steps[part[0]], 0), (4, 4), textcoords="offset points",
            fontsize=9, color=FAINT,
        )  # fmt: skip
    sbd.set_ylim(0, 1)
    dic.set_ylim(bottom=0)
    for axes in (rate, dic):
        axes.set_xlabel("step")
    return figure


def save_training_curves(run: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Write :func:`training_curves` as a PNG, whole or not at all."""
    figure = training_curves(run)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def require_matplotlib() -> type[Figure]:
    """The class ``matplotlib.figure.Figure``, which draws without a display.

    Raises:
        InputError: matplotlib is not installed; the message says how to install it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError(
            "curves need matplotlib, which is not installed: pip install 'fastris[curves]' or matplotlib"
        ) from None
    return Figure


def _read(path: Path, columns: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Columns of a log as float64; a last line that a killed run left half-written is dropped."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            lines = [line for line in reader if line]
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; expected the folder of a training run") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot read: {error}") from None
    missing = [name for name in columns if name not in header]
    if missing:
        raise InputError(f"{path}: not the log of a training run: it has no column {missing[0]}")
    if lines and len(lines[-1]) < len(header):
        lines.pop()
    try:
        values = np.array([[float(line[header.index(name)]) for name in columns] for line in lines])
    except (ValueError, IndexError):
        raise InputError(f"{path}: damaged: expected {len(header)} numbers a line") from None
    return dict(zip(columns, values.reshape(-1, len(columns)).T, strict=True))


def _stages(log: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The rows of each stage, in order."""
    return np.split(np.arange(log["stage"].size), np.flatnonzero(np.diff(log["stage"])) + 1)


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of the latest `window` values at each, or of as many as there are."""
    sums = np.cumsum(np.append(0.0, values))
    last = np.arange(1, values.size + 1)
    first = np.maximum(last - window, 0)
    return (sums[last] - sums[first]) / (last - first)
