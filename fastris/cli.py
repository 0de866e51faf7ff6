"""The command line: ``fastris demo | train | curves | predict | evaluate | export | info``.

Exit codes: 0 done, 1 something failed on the way, 2 the input or the options were wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack

from fastris import __version__
from fastris.commands import curves, demo, evaluate, export, info, predict, train
from fastris.commands.common import complain
from fastris.errors import InputError

COMMANDS = {
    "demo": demo,
    "train": train,
    "curves": curves,
    "predict": predict,
    "evaluate": evaluate,
    "export": export,
    "info": info,
}


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser of all commands; the options of ``train``, which need torch, only where `command` asks for them."""
    parser = argparse.ArgumentParser(
        prog="fastris",
        description="Recurrent instance segmentation: find, outline and count the objects in images, one at a time.",
    )
    parser.add_argument("--version", action="version", version=f"fastris {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=module.HELP, description=module.HELP[0].upper() + module.HELP[1:])
        if name != "train" or command == "train":
            module.add_arguments(subparser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = build_parser(next(iter(arguments), None)).parse_args(arguments)
    try:
        with ExitStack() as stack:
            _use_backend(stack, getattr(args, "backend", None))
            return COMMANDS[args.command].run(args)
    except InputError as error:
        complain(error)
        return 2
    except KeyboardInterrupt:
        print("fastris: interrupted", file=sys.stderr)
        return 1
    except OSError as error:
        complain(error)
        return 1


def _use_backend(stack: ExitStack, name: str | None) -> None:
    try:
        from fastris.backend import use_backend  # checks FASTRIS_BACKEND
    except ValueError as error:
        raise InputError(str(error)) from None
    if name is None:
        return
    try:
        stack.enter_context(use_backend(name))
    except RuntimeError as error:
        raise InputError(f"--backend {name}: {error}") from None
