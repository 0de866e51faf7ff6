"""Run parts of the GPU benchmarks and write their results.

PYTHONPATH=benchmarks python -m gpu.measure gates --out benchmarks/results/gpu
PYTHONPATH=benchmarks python -m gpu.measure gates --out /tmp/gpu --device cpu --tiny     a rehearsal
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from gpu import assignment, checks, convlstm, gates, soft_iou, step
from gpu.harness import Harness

PARTS = {
    "tests": checks.tests,
    "sanitizer": checks.sanitizer,
    "gates": gates.measure,
    "convlstm": convlstm.measure,
    "soft_iou": soft_iou.measure,
    "assignment": assignment.measure,
    "step": step.measure,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, required=True, help="folder for PART.json")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="small inputs, no compilation: whether it runs at all")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA GPU; --device cpu --tiny is a rehearsal", file=sys.stderr)
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    wrong = False
    for part in arguments.parts:
        harness = Harness(part, arguments.out, arguments.device, arguments.tiny)
        PARTS[part](harness)
        harness.finish()
        wrong |= any(row.wrong for row in harness.rows)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
