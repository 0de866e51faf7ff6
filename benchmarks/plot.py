"""Draw a result of report.py: a panel per shape, a row per case, a mark per peer on a logarithmic axis of time.

    python benchmarks/plot.py benchmarks/results/assignment.json

writes ``<suite>-<dtype>.png`` beside the file. Needs matplotlib, part of the ``bench`` extra.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from fastris.imageio import atomic_write

MARKS = "osD^v<>PX*hp"


def draw(path: Path) -> list[Path]:
    """Draw every dtype of a result file.

    Raises:
        ImportError: no matplotlib.
    """
    result = json.loads(path.read_text(encoding="utf-8"))
    written = []
    for dtype in dict.fromkeys(case["labels"].get("dtype") for case in result["cases"]):
        cases = [case for case in result["cases"] if case["labels"].get("dtype") == dtype]
        target = path.with_name(f"{path.stem}-{dtype}.png" if dtype else f"{path.stem}.png")
        _draw(result, cases, dtype, target)
        written.append(target)
    return written


def _draw(result: dict[str, Any], cases: list[dict[str, Any]], dtype: str | None, target: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, NullLocator

    names = list(dict.fromkeys(name for case in cases for name in case["peers"]))
    shapes = list(dict.fromkeys(case["labels"]["shape"] for case in cases))
    most = max(sum(case["labels"]["shape"] == shape for case in cases) for shape in shapes)
    columns = min(3, len(shapes))
    rows = -(-len(shapes) // columns)
    beside = min(5, 2 * columns, len(names))  # entries of the legend in a row
    height = rows * (1.1 + 0.26 * max(most, 3)) + 1 + 0.25 * -(-len(names) // beside)
    figure = Figure(figsize=(5.2 * columns, height), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for shape, panel in zip(shapes, panels, strict=False):  # in this order no panel is lost
        of_shape = [case for case in cases if case["labels"]["shape"] == shape]
        for height, case in enumerate(of_shape):
            for name, peer in case["peers"].items():
                if "microseconds" in peer:
                    low, median, high = peer["microseconds"]
                    panel.plot([low, high], [height, height], color=_colour(names, name), linewidth=1.5)
                    panel.plot(median, height, alpha=0.85, **_mark(names, name))
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(lambda microseconds, _: _short(microseconds))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_xlabel(f"µs per {result['item']}, median and quartiles")
        panel.set_title(shape.replace("x", "×"))
        panel.set_yticks(range(len(of_shape)), [_row(case["labels"]) for case in of_shape], fontsize=8)
        panel.set_ylim(len(of_shape) - 0.5, -0.5)
        panel.grid(axis="x", which="both", alpha=0.25)
        panel.grid(axis="y", alpha=0.15)
    for panel in panels:
        panel.remove()
    figure.legend(
        handles=[Line2D([], [], label=name, **_mark(names, name)) for name in names],
        loc="outside lower center",
        ncols=beside,
    )
    threads = f"{result['threads']} thread{'' if result['threads'] == '1' else 's'}"
    heading = [result["suite"], dtype, threads, f"{result['processor']}, {result['cores']} cores"]
    figure.suptitle(" · ".join(filter(None, heading)))
    with atomic_write(target) as temporary:
        figure.savefig(temporary, dpi=120)


def _short(number: float) -> str:
    """As in 0.5, 20, 5k and 10M."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:g}{unit}"
    return f"{number:g}"


def _row(labels: dict[str, str]) -> str:
    """What the panel and the file do not say already."""
    said = {"batch": "B=", "steps": "T="}
    return " ".join(said.get(axis, "") + text for axis, text in labels.items() if axis not in ("shape", "dtype"))


def _colour(names: list[str], name: str) -> str:
    return f"C{names.index(name) % 10}"


def _mark(names: list[str], name: str) -> dict[str, Any]:
    marker = MARKS[names.index(name) % len(MARKS)]
    return {"marker": marker, "color": _colour(names, name), "linestyle": "none", "markersize": 6}


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(*draw(Path(argument)))
