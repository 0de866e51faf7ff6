"""Interleaved comparison of a suite: a JSON file, a Markdown table and a plot.

    python benchmarks/report.py assignment --threads 1
    python benchmarks/report.py assignment --shapes 22x20 100x20 --families uniform soft_iou --batches 64 --rounds 21
    python benchmarks/report.py scaling           one thread against two threads
    python benchmarks/report.py overhead          what a call with one matrix costs, by entry point
    python benchmarks/report.py convlstm --rounds 3 --passes forward --without torch.compile --update

writes ``benchmarks/results/<suite>.json`` and, with matplotlib, ``<suite>-<dtype>.png`` beside it; with more threads
than one, ``<suite>-2-threads.json``. With ``--update`` other cases that are in the file stay. A peer with a wrong
answer is marked so and not timed. Run it on a quiet machine: interleaving cancels drift, not contention. Exit code 1: a
wrong answer of fastris.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import fastris
from fastris.imageio import atomic_write
from interleave import interleave, ratio, spread
from memory import peak_extra
from plot import draw
from suites import SUITES, Labels, Suite

RESULTS = Path(__file__).parent / "results"
MICRO = 1e6
MEBI = 2**20


def measure(suite: Suite, labels: Labels, rounds: int, without: Sequence[str] = ()) -> dict[str, Any]:
    """One case: what its peers took and held, or why not.

    Returns:
        ``labels``, ``items``, ``command``, ``load_average`` before the timing and ``peers``: for each peer by name its
        ``version`` and either ``missing``, ``wrong`` or ``microseconds`` (quartiles per item), ``ratio`` (quartiles of
        its time over that of the suite's base in the same round, None without a base), ``rounds`` and ``extra_bytes``.
    """
    case = suite.build(labels)
    peers = {peer.name: peer for peer in suite.peers(labels)}
    found: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], None]] = {}
    for name, peer in peers.items():
        found[name] = {"version": peer.version}
        if name in without:
            found[name]["missing"] = "left out by --without"
        elif peer.missing:
            found[name]["missing"] = peer.missing
        elif fault := case.fault(peer):
            found[name]["wrong"] = fault
        else:
            calls[name] = partial(case.run, peer)
    load_average = os.getloadavg()
    samples = interleave(calls, rounds)
    base = samples.get(suite.base)
    for name, times in samples.items():
        found[name].update(
            microseconds=spread([MICRO * seconds / case.items for seconds in times.values()]),
            ratio=None if base is None else ratio(times, base),
            rounds=len(times),
            extra_bytes=peak_extra(calls[name]),
        )
    how = {"command": command(), "load_average": load_average}
    return {"labels": dict(labels), "items": case.items, **how, "peers": found}


def provenance(threads: str) -> dict[str, Any]:
    """What a reader needs to judge and repeat the numbers."""
    return {
        "command": command(),
        "threads": threads,
        "processor": processor(),
        "cores": os.cpu_count(),
        "load_average_at_start": os.getloadavg(),
        "system": platform.platform(),
        "fastris": fastris.info(),
    }


def command() -> str:
    return " ".join(["python", *sys.argv])


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


# Tables


def table(suite: Suite, cases: list[dict[str, Any]], cell: Callable[[dict[str, Any]], str]) -> str:
    """Markdown: a row per case, a column per peer."""
    names = list(dict.fromkeys(name for case in cases for name in case["peers"]))
    axes = list(cases[0]["labels"])
    lines = [axes + names, ["---"] * len(axes) + ["---:"] * len(names)]
    for case in cases:
        cells = [cell(case["peers"][name]) if name in case["peers"] else "" for name in names]
        lines.append([*case["labels"].values(), *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def time_cell(peer: dict[str, Any]) -> str:
    if "microseconds" not in peer:
        return "wrong" if "wrong" in peer else "–"
    microseconds = peer["microseconds"][1]
    text = f"{microseconds:.3g}" if microseconds < 100 else f"{microseconds:,.0f}"
    if peer["ratio"] is None:
        return text
    low, median, high = peer["ratio"]
    return f"{text} · {median:.2f}× ({low:.2f}–{high:.2f})"


def memory_cell(peer: dict[str, Any]) -> str:
    extra = peer.get("extra_bytes")
    return "–" if extra is None else f"{extra / MEBI:.1f}"


def remarks(cases: list[dict[str, Any]]) -> list[str]:
    """Versions of all peers, why some did not run, and the first case in which each wrong one was wrong."""
    every = [(case["labels"], name, peer) for case in cases for name, peer in case["peers"].items()]
    versions = {name: peer["version"] for _, name, peer in every}
    missing = dict.fromkeys(f"Missing: {name}: {peer['missing']}" for _, name, peer in every if "missing" in peer)
    wrong: dict[str, str] = {}
    for labels, name, peer in every:
        if "wrong" in peer:
            wrong.setdefault(name, f"Wrong: {name}, first at {' '.join(labels.values())}: {peer['wrong']}")
    said = ", ".join(f"{name} {version}" for name, version in versions.items())
    return [f"Versions: {said}.", *missing, *wrong.values()]


def print_report(suite: Suite, result: dict[str, Any]) -> None:
    cases = result["cases"]
    print(f"\n{result['processor']}, {result['cores']} cores, threads: {result['threads']}\n")
    print(f"µs per {suite.item} (median) · time relative to {suite.base} in the same round (median, quartiles)\n")
    print(table(suite, cases, time_cell))
    print("\nPeak extra memory, MiB\n")
    print(table(suite, cases, memory_cell))
    print("", *remarks(cases), sep="\n")


# Command line


def selected(suite: Suite, arguments: argparse.Namespace) -> list[Labels]:
    wanted = {axis: getattr(arguments, axis) for axis in ("shape", "family", "batch", "dtype", "pass")}
    return [
        labels
        for labels in suite.grid
        if (not arguments.quick or suite.quick(labels))
        and all(not values or labels.get(axis, values[0]) in values for axis, values in wanted.items())
    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=list(SUITES))
    parser.add_argument("--threads", type=int, default=1, help="of every contestant that can use more than one (1)")
    parser.add_argument("--rounds", type=int, default=11, help="interleaved rounds (11)")
    parser.add_argument("--quick", action="store_true", help="small cases only")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results (benchmarks/results)")
    parser.add_argument("--update", action="store_true", help="keep the other cases that the results have already")
    parser.add_argument("--without", nargs="+", default=[], metavar="PEER", help="peers that sit out, for speed")
    axes = {"shapes": "shape", "families": "family", "batches": "batch", "dtypes": "dtype", "passes": "pass"}
    for option, axis in axes.items():
        parser.add_argument(f"--{option}", dest=axis, nargs="+", default=[], metavar=axis.upper(), help="only these")
    arguments = parser.parse_args()
    if arguments.rounds < 1 or arguments.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    return arguments


def earlier_cases(path: Path, suite: Suite, result: dict[str, Any]) -> list[dict[str, Any]]:
    """The cases of a result file that new ones may stand beside: same processor, same versions."""
    if not path.exists():
        return []
    earlier = json.loads(path.read_text(encoding="utf-8"))
    if any(earlier[key] != result[key] for key in ("processor", "system", "threads", "fastris")):
        raise SystemExit(f"{path} is of another machine or other versions: it cannot be updated")
    return [case for case in earlier["cases"] if case["labels"] in suite.grid]


def main() -> int:
    arguments = parse()
    suite = SUITES[arguments.suite]
    cases = selected(suite, arguments)
    if not cases:
        print(
            "no case is left; labels of the suite are",
            *(" ".join(labels.values()) for labels in suite.grid),
            sep="\n  ",
        )
        return 2
    torch.set_num_threads(arguments.threads)
    result = provenance("1 and 2" if suite.name == "scaling" else str(arguments.threads))
    result.update(suite=suite.name, item=suite.item, base=suite.base, rounds=arguments.rounds, cases=[])
    arguments.out.mkdir(parents=True, exist_ok=True)
    suffix = f"-{arguments.threads}-threads" if arguments.threads > 1 else ""
    path = arguments.out / f"{suite.name}{suffix}.json"
    kept = earlier_cases(path, suite, result) if arguments.update else []
    for number, labels in enumerate(cases, 1):
        print(f"[{number}/{len(cases)}]", *labels.values(), file=sys.stderr, flush=True)
        new = measure(suite, labels, arguments.rounds, arguments.without)
        kept = [case for case in kept if case["labels"] != labels] + [new]
        result["cases"] = sorted(kept, key=lambda case: suite.grid.index(case["labels"]))
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print_report(suite, result)
    written = [path]
    try:
        written += draw(path)
    except ImportError as error:
        print(f"no plot: {error}")
    print("\nwritten to", *written)
    return int(any("wrong" in peer and "fastris" in name for c in result["cases"] for name, peer in c["peers"].items()))


if __name__ == "__main__":
    sys.exit(main())
