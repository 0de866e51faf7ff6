"""The GPU benchmarks, rehearsed on the CPU: that they run, refuse wrong answers, and say what is missing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import fastris
from fastris import backend

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
PARTS = ("sanitizer", "gates", "convlstm", "soft_iou", "step")

pytestmark = [
    pytest.mark.skipif(backend.native_error() is not None, reason="fastris._C is not built"),
    pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="no benchmarks beside these tests"),
]


def environment(**more: str) -> dict[str, str]:
    package = str(Path(fastris.__file__).parents[1])
    paths = [str(BENCHMARKS), package, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **more}


@pytest.fixture
def harness_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from gpu import harness

    return harness


@pytest.fixture
def harness(harness_module: ModuleType, tmp_path: Path) -> Any:
    return harness_module.Harness("gates", tmp_path, "cpu", True)


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_the_script_ends_with_a_table(tmp_path: Path) -> None:
    result = subprocess.run(
        ["bash", str(BENCHMARKS / "gpu/run_all.sh"), "--rehearse", "assignment", "no-such-part"],
        env=environment(PYTHON=sys.executable, OUT=str(tmp_path)),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1, "a part that does not run is a failure"
    table, _, faults = result.stdout[result.stdout.index("\nkernel ") :].partition("\n\n")
    assert "assignment 7×5 B4 soft_iou" in table and "SciPy over the bus" in table
    assert faults.strip() == "no-such-part: no results"
    written = json.loads((tmp_path / "assignment.json").read_text())
    assert written["finished"] and written["command"] == "python -m gpu.measure assignment" and written["tiny"]
    assert written["fastris"]["versions"]["torch"] == torch.__version__ and "rehearsal" in written["device"]


def test_every_part_runs_and_is_right(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gpu.measure", *PARTS, "--out", str(tmp_path), "--device", "cpu", "--tiny"]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for part in PARTS:
        written = json.loads((tmp_path / f"{part}.json").read_text())
        assert written["finished"] and written["rows"]
        for row in written["rows"]:
            assert row["wrong"] == "" and (part == "sanitizer" or row["microseconds"][1] > 0), row
            assert not any(str(peer).startswith("wrong") for peer in row["peers"].values()), row


def test_nobody_with_a_wrong_answer_is_timed(harness: Any, harness_module: ModuleType) -> None:
    called = []

    def wrong() -> int:
        called.append(1)
        return 2

    def absent() -> Any:
        raise harness_module.Absent("not installed")

    peers = {"wrong": harness_module.ready(wrong), "absent": harness_module.Peer(absent)}
    row = harness.measure("right", lambda: 1, lambda found: "" if found == 1 else f"it is {found}", peers)
    assert row.microseconds[0] <= row.microseconds[1] <= row.microseconds[2]
    assert row.peers == {"wrong": "wrong: it is 2", "absent": "absent: not installed"} and len(called) == 1
    assert harness.measure("wrong", wrong, lambda found: "off", {}).microseconds is None
    broken = harness.measure("broken", lambda: 1 // 0, lambda found: "", {})
    assert broken.microseconds is None and "ZeroDivisionError" in broken.wrong


def test_targets_are_met_missed_or_not_judged(harness_module: ModuleType) -> None:
    row = harness_module.Row("one", [9.0, 10.0, 11.0], floor=9.0)
    row.peers = {"slow": [49.0, 50.0, 51.0], "quick": [11.0, 12.0, 13.0], "gone": "absent: not here"}
    row.within_floor(0.85)
    row.within_floor(0.95)
    row.at_most(10)
    row.at_most(9)
    row.ahead_of("slow", 5)
    row.ahead_of("quick", 1.5)
    row.ahead_of("gone", 2)
    assert list(row.targets.values()) == [True, False, True, False, True, False, None]
    assert row.best_peer() == ("quick", 1.2)


def test_the_table_names_what_failed_or_was_cut_short(
    harness: Any, harness_module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from gpu import table

    def code(*parts: str) -> int:
        monkeypatch.setattr(sys, "argv", ["table", str(tmp_path), *parts])
        return table.main()

    harness.measure("a kernel", lambda: 1, lambda found: "", {})
    assert code("gates") == 1 and "gates: cut short" in capsys.readouterr().out
    harness.finish()
    assert code("gates") == 0 and "a kernel" in capsys.readouterr().out
    assert code("gates", "step") == 1 and "step: no results" in capsys.readouterr().out
    harness.measure("another", lambda: 1, lambda found: "it is off", {})
    harness.finish()
    assert code("gates") == 1 and "another: it is off" in capsys.readouterr().out


SASS = """
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;      /* 0x0000000402047981 */
        /*0010*/              @!P0 LDG.E R8, desc[UR4][R2.64+0x10] ;     /* 0x0000100402088981 */
        /*0020*/                   LDGSTS.E.BYPASS.128 [R9], desc[UR4][R2.64] ;
        /*0030*/             @!UP0 HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0040*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0050*/                   EXIT ;
        /*0060*/                   NOP ;
"""


def test_machine_code_is_counted_and_occupancy_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from gpu.machine_code import kernel_of, occupancy

    one = kernel_of("one", 90, 90, 0, 8192, 4, SASS)
    assert (one.loads, one.stores, one.copies, one.products, one.instructions) == ((1, 1), (1, 0), 1, 1, 6)
    assert one.warps == occupancy(90, 90, 8192, 4) == 20  # 96 registers of 65536: 21 warps, five programs of four
    assert occupancy(90, 32, 0, 4) == 64
    assert occupancy(90, 32, 100 * 1024, 4) == 8  # two programs' shared memory
    assert occupancy(80, 32, 100 * 1024, 4) == 4
