"""``fastris info``: versions, and which back ends are live and why not."""

from __future__ import annotations

import argparse

HELP = "show versions, and which operators run natively and why the others do not"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--backend", choices=("auto", "reference", "native"), help="report as with this back end")


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    from fastris.environment import format_info

    print(format_info())
    return 0
