"""What must hold before a time counts: pytest on the GPU, and compute-sanitizer on the matcher."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from gpu.harness import Harness, Row

ROOT = Path(__file__).resolve().parents[2]
TESTS = ["tests/ops", "tests/nn", "tests/kernels", "tests/training"]
TOOLS = ("memcheck", "racecheck")

MATCHER = """
import torch, fastris
device = "{device}"
for shape in {shapes}:
    for dtype in (torch.float32, torch.float64):
        cost = torch.rand(shape, dtype=dtype)
        cost[torch.rand(shape) < 0.1] = float("inf")
        cost[torch.rand(shape) < 0.05] = float("nan")
        counts = [torch.randint(0, side + 1, shape[:1]) for side in shape[1:]]
        found = fastris.assignment(cost.to(device), *(count.to(device) for count in counts))
        expected = fastris.assignment(cost, *counts)
        assert torch.equal(found.col_of_row.cpu(), expected.col_of_row), shape
        assert torch.equal(found.status.cpu(), expected.status), shape
"""
# A warp a matrix, a block a matrix, and one in global memory for want of shared memory.
SHAPES = [(5, 22, 20), (3, 1, 7), (2, 100, 100), (2, 130, 140), (1, 300, 300)]


def tests(harness: Harness) -> None:
    """``pytest -m gpu``; in a rehearsal those tests are only collected."""
    row = Row("pytest -m gpu")
    harness.rows.append(row)
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *TESTS]
    if importlib.util.find_spec("xdist"):
        command += ["-n", "4"]  # most of the time compiles kernels
    if not harness.cuda:
        command += ["--collect-only"]
    text, code = _run(command)
    last = next(
        (line for line in reversed(text.splitlines()) if re.search(r"\d+ (passed|failed|tests)|error", line)), ""
    )
    harness.facts["pytest"] = last.strip("= ")
    failed = [line for line in text.splitlines() if line.startswith(("FAILED", "ERROR"))]
    row.wrong = f"exit code {code}: {last} {' '.join(failed[:5])}" if code else ""
    row.targets["all pass" if harness.cuda else "collected"] = code == 0
    print(text[-6000:] if code else last, file=sys.stderr)


def sanitizer(harness: Harness) -> None:
    """memcheck and racecheck of the matcher, with torch's allocator out of the way; neither in a rehearsal."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    shapes = SHAPES[:1] if harness.tiny else SHAPES
    script = MATCHER.format(device=harness.device, shapes=shapes)
    for name in TOOLS:
        row = Row(f"assignment under {name}" if harness.cuda else f"assignment, no {name}")
        harness.rows.append(row)
        command = [sys.executable, "-c", script]
        if tool and harness.cuda:
            command = [tool, "--tool", name, "--error-exitcode", "9", *command]
        elif harness.cuda:
            row.targets["no error"] = None
            harness.facts[name] = "absent: no compute-sanitizer"
            continue
        text, code = _run(command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        summary = [line.strip("= ") for line in text.splitlines() if "SUMMARY" in line]
        harness.facts[name] = " ".join(summary) or f"exit code {code}"
        row.wrong = f"exit code {code}: {' '.join(summary) or text[-300:]}" if code else ""
        row.targets["no error"] = code == 0
        print(f"  {row.kernel}: {harness.facts[name]}", file=sys.stderr)


def _run(command: list[str], **environment: str) -> tuple[str, int]:
    result = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return result.stdout, result.returncode
