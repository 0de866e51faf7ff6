"""What a run writes down: CSV always, TensorBoard and a picture of the curves where those packages are installed."""

from __future__ import annotations

import csv
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastris.errors import InputError
from fastris.imageio import atomic_write


class CsvLog:
    """Rows with a ``step`` in a CSV file; opening it again at a step drops the rows after that step."""

    def __init__(self, path: Path, columns: tuple[str, ...], step: int = 0) -> None:
        kept: list[dict[str, str]] = []
        if step and path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                kept = [
                    row for row in csv.DictReader(file) if (row["step"] or "").isdecimal() and int(row["step"]) <= step
                ]
        with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore", restval="")
            writer.writeheader()
            writer.writerows(kept)
        self._file = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, columns)

    def add(self, row: dict[str, Any]) -> None:
        """Write a row; floats to six digits."""
        self._writer.writerow(
            {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}
        )
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class RunLog:
    """``train.csv`` and ``validation.csv`` in a run's folder.

    With the package tensorboard also ``tensorboard/``; with matplotlib ``curves.png``, drawn anew at the end and at a
    validation at most once a minute, as drawing takes half a second.
    """

    redraw_after = 60.0  # seconds

    train_columns = (
        "step",
        "stage",
        "loss",
        "mask",
        "confidence",
        "place",
        "dense",
        "gradient_norm",
        "learning_rate",
        "images_per_second",
    )
    validation_columns = ("step", "stage", "loss", "sbd", "dic", "map", "ap50", "images")

    def __init__(self, out: Path, step: int = 0) -> None:
        self._train = CsvLog(out / "train.csv", self.train_columns, step)
        self._validation = CsvLog(out / "validation.csv", self.validation_columns, step)
        self._board = _summary_writer(out / "tensorboard", step)
        self._out = out
        self._drawn = time.monotonic()

    def train(self, row: dict[str, Any]) -> None:
        """One optimiser step."""
        self._train.add(row)
        self._scalars("train", row)

    def validation(self, row: dict[str, Any]) -> None:
        """One validation."""
        self._validation.add(row)
        self._scalars("validation", row)
        if time.monotonic() - self._drawn >= self.redraw_after:
            self._draw()

    def close(self) -> None:
        """Close the files."""
        self._train.close()
        self._validation.close()
        if self._board is not None:
            self._board.close()
        self._draw()

    def _draw(self) -> None:
        from fastris.viz import save_training_curves

        with suppress(InputError, OSError):  # no matplotlib, no step yet, no room: the run goes on without the picture
            save_training_curves(self._out, self._out / "curves.png")
        self._drawn = time.monotonic()

    def _scalars(self, group: str, row: dict[str, Any]) -> None:
        if self._board is not None:
            for name, value in row.items():
                if name != "step":
                    self._board.add_scalar(f"{group}/{name}", value, row["step"])


def _summary_writer(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)
