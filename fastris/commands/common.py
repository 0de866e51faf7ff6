"""What several commands share: options, the device, the model, and lines for the terminal."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from fastris.errors import InputError

if TYPE_CHECKING:
    import torch

    from fastris.instances import Instances
    from fastris.nn.model import RecurrentInstanceSegmenter


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """--weights --threshold --max-steps --tile --overlap --crf --device --backend."""
    parser.add_argument(
        "--weights", default="nuclei", metavar="NAME_OR_PATH", help="a shipped model or a .safetensors file (nuclei)"
    )
    parser.add_argument(
        "--threshold", type=_fraction, default=0.5, metavar="S", help="stop at the first confidence below this (0.5)"
    )
    parser.add_argument(
        "--max-steps",
        type=positive_integer,
        metavar="N",
        help="the most objects per image, or tile (the model's own)",
    )
    parser.add_argument(
        "--tile",
        type=positive_integer,
        metavar="PIXELS",
        help="look at square tiles of this side and stitch them, for large or crowded images (the whole image)",
    )
    parser.add_argument(
        "--overlap", type=int, metavar="PIXELS", help="what neighbouring tiles share at least (a quarter of a tile)"
    )
    parser.add_argument("--crf", action="store_true", help="refine the masks of an image together with a dense CRF")
    add_run_options(parser)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """--device --backend."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 … (auto: a GPU if there is one)")
    parser.add_argument(
        "--backend", choices=("auto", "reference", "native"), help="which operators to run (FASTRIS_BACKEND, or auto)"
    )


def positive_integer(text: str) -> int:
    """An argparse type: a whole number from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text}")
    return value


positive_integer.__name__ = "whole number"  # argparse puts the name in its message


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text}")
    return value


_fraction.__name__ = "number"


def image_size(text: str) -> tuple[int, int]:
    """An argparse type: height and width as in 256x320, or one number for both."""
    parts = [int(part) for part in text.lower().split("x")]
    height, width = parts * 2 if len(parts) == 1 else parts
    if min(height, width) < 1:
        raise ValueError
    return height, width


image_size.__name__ = "size (HxW)"


def resolve_device(name: str) -> torch.device:
    """The device of ``--device``.

    Raises:
        InputError: there is no such device here.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name}: cannot be used here: {reason}") from None
    return device


def load_model(args: argparse.Namespace) -> RecurrentInstanceSegmenter:
    """The model of ``--weights`` on ``--device``, for which ``--tile`` and ``--overlap`` are right."""
    from fastris.loading import load
    from fastris.tiling import check_tiling

    device = resolve_device(args.device)
    model = load(args.weights).to(device)
    check_tiling(args.tile, args.overlap, model.config.max_side)
    return model


def find_instances(
    model: RecurrentInstanceSegmenter, image: Any, name: str, args: argparse.Namespace, refine: bool = True
) -> Instances:
    """The instances of one image; what the model warns about becomes a line on stderr that names the image.

    ``refine=False`` leaves out the CRF of the options.
    """
    crf = None
    if args.crf and refine:
        from fastris.crf import NUCLEI, DenseCRF

        crf = DenseCRF(**NUCLEI)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        instances = model.predict(
            image,
            max_steps=args.max_steps,
            threshold=args.threshold,
            crf=crf,
            tile=args.tile,
            overlap=args.overlap,
        )
    assert not isinstance(instances, list)  # as one image went in
    for warning in caught:
        if issubclass(warning.category, UserWarning):
            note(f"{name}: {str(warning.message).removeprefix('image: ')}")
    instances.name = name
    return instances


def complain(message: object) -> None:
    """One line about bad input on stderr."""
    print(f"fastris: error: {_one_line(message)}", file=sys.stderr, flush=True)


def note(message: object) -> None:
    """One line on stderr about something worth knowing."""
    print(f"fastris: note: {_one_line(message)}", file=sys.stderr, flush=True)


def _one_line(message: object) -> str:
    return " ".join(str(message).split())


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Aligned columns: the first to the left, the others to the right, numbers with a fraction to three places."""
    cells = [list(header)] + [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[k]) for row in cells) for k in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if k == 0 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )
