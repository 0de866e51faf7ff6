"""``fastris train``: everything is in :mod:`fastris.training.cli`."""

from __future__ import annotations

import argparse

HELP = "train a model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command; imports torch."""
    from fastris.training.cli import add_arguments as add_training_arguments

    add_training_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Train."""
    from fastris.training.cli import main

    return main(args)
