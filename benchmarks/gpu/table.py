"""The short table of all parts that a folder has results of.

    PYTHONPATH=benchmarks python -m gpu.table benchmarks/results/gpu tests gates

Exit code 1: one of the parts named is missing or was cut short, or an answer was wrong. A target that is not met is no
failure; the table says so.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from gpu.harness import Row

HEADER = ("kernel", "µs", "floor µs", "of floor", "best peer", "ratio", "target", "met")


def number(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def line(row: Row) -> tuple[str, ...]:
    best = row.best_peer()
    met = {True: "yes", False: "no", None: "–"}
    return (
        row.kernel,
        number(row.median) if row.microseconds else "WRONG" if row.wrong else "–",
        number(row.floor) if row.floor else "–",
        f"{row.floor / row.median:.0%}" if row.floor and row.microseconds else "–",
        best[0] if best else "–",
        f"{best[1]:.2f}×" if best else "–",
        ", ".join(row.targets) or "–",
        ", ".join(met[value] for value in row.targets.values()) or "–",
    )


def table(rows: list[Row]) -> str:
    lines = [HEADER, *map(line, rows)]
    widths = [max(len(cells[k]) for cells in lines) for k in range(len(HEADER))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) for cells in lines)


def main() -> int:
    folder, parts = Path(sys.argv[1]), sys.argv[2:]
    results: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        results[result["part"]] = result
    faults = [f"{part}: no results" for part in parts if part not in results]
    faults += [f"{part}: cut short" for part in parts if part in results and not results[part]["finished"]]
    order = [*parts, *(part for part in results if part not in parts)]
    rows = [Row(**row) for part in order if part in results for row in results[part]["rows"]]
    faults += [f"{row.kernel}: {row.wrong}" for row in rows if row.wrong]
    absent = {f"{name}: {result}" for row in rows for name, result in row.peers.items() if isinstance(result, str)}
    devices = dict.fromkeys(result["device"] for result in results.values())
    print("", *devices, "", sep="\n")
    for text in sorted(absent):
        print(text)
    print("", table(rows), "", *faults, sep="\n")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
