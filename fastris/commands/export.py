"""``fastris export``: a model as ONNX graphs, to run without PyTorch."""

from __future__ import annotations

import argparse

from fastris.commands.common import image_size

HELP = "write a model as ONNX graphs of its features and of a step"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "--weights", default="nuclei", metavar="NAME_OR_PATH", help="a shipped model or a .safetensors file (nuclei)"
    )
    parser.add_argument("--out", default="fastris-export", metavar="DIR", help="where to write (fastris-export)")
    parser.add_argument("--size", type=image_size, metavar="HxW", help="only for images of this size (of any)")


def run(args: argparse.Namespace) -> int:
    """Export, and say what was written."""
    from fastris.export import export_onnx
    from fastris.loading import load

    for path in export_onnx(load(args.weights), args.out, args.size):
        print(f"wrote {path}")
    return 0
