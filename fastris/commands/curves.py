"""``fastris curves``: the curves of a training run."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "draw the curves of a training run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run of fastris train")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write curves.png (RUN)")


def run(args: argparse.Namespace) -> int:
    """Draw loss, SBD, |DiC| and learning rate."""
    from fastris.imageio import make_output_directory
    from fastris.viz import save_training_curves

    path = (make_output_directory(args.out) if args.out else args.run) / "curves.png"
    save_training_curves(args.run, path)
    print(f"wrote {path}")
    return 0
