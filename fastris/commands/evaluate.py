"""``fastris evaluate``: the metrics of a model on a labelled data set."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastris.commands.common import add_model_options, complain, find_instances, load_model, positive_integer, table
from fastris.errors import InputError

if TYPE_CHECKING:
    from fastris.data import Sample
    from fastris.nn.model import RecurrentInstanceSegmenter

HELP = "measure a model on labelled images"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "--data",
        required=True,
        metavar="PATH",
        help="DSB2018 zip or folder, folder of *_rgb.png and *_label.png, or 'leaves' (generated)",
    )
    parser.add_argument(
        "--split", choices=("train", "validation", "all"), default="validation", help="which images (validation)"
    )
    parser.add_argument("--max-instances", type=positive_integer, metavar="N", help="only images with at most N")
    parser.add_argument("--size", type=_size, metavar="HxW", help="only images of this size, such as 256x256")
    parser.add_argument("--seed", type=int, help="seed of generated data")
    parser.add_argument("--out", default="fastris-evaluate", metavar="DIR", help="where to write (fastris-evaluate)")
    parser.add_argument(
        "--figure",
        type=positive_integer,
        nargs="?",
        const=3,
        metavar="N",
        help="also write figure.png: N images from the worst to the best by SBD, at equal steps of rank (3)",
    )
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Predict every image, print the table, write evaluate.json."""
    from fastris.data import open_dataset
    from fastris.imageio import atomic_write, make_output_directory
    from fastris.metrics import InstanceMetrics

    out = make_output_directory(args.out)
    options: dict[str, Any] = {"max_instances": args.max_instances, "size": args.size}
    if args.seed is not None:
        if Path(args.data).exists() or args.data.partition(":")[0] != "leaves":
            raise InputError(f"--seed: only generated data ('leaves') has a seed, not {args.data}")
        options["seed"] = args.seed
    dataset = open_dataset(args.data, args.split, **{key: value for key, value in options.items() if value is not None})
    model = load_model(args)
    metrics = InstanceMetrics()
    failed = 0
    measured: list[int] = []  # the index of each row of the metrics
    for index in range(len(dataset)):
        try:
            sample = dataset[index]
        except InputError as error:
            complain(error)
            failed += 1
            continue
        instances = find_instances(model, sample.image, sample.name, args)
        metrics.update(instances.label_map(), sample.labels.numpy(), sample.name)
        measured.append(index)
    if not metrics.rows:
        raise InputError(f"{args.data}: no image to evaluate in split '{args.split}' with these options")

    means = metrics.compute()
    print(
        table(
            ("model", "SBD", "|DiC|", "mAP", "AP@0.5", "images"),
            [(args.weights, means["sbd"], means["dic"], means["map"], means["ap50"], int(means["images"]))],
        )
    )
    settings = {
        key: getattr(args, key)
        for key in ("data", "split", "max_instances", "size", "seed", "weights", "threshold", "max_steps")
    }
    report = {"settings": settings, "metrics": means, "failed": failed, "images": metrics.rows}
    path = out / "evaluate.json"
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwrote {path}")
    if args.figure:
        chosen = spread([row["sbd"] for row in metrics.rows], args.figure)
        write_figure(out / "figure.png", [(dataset[measured[row]], title) for row, title in chosen], model, args)
    return 2 if failed else 0


def spread(scores: Sequence[float], number: int) -> list[tuple[int, str]]:
    """Index and title of scores from the worst to the best at equal steps of rank; of one score, the median."""
    order = sorted(range(len(scores)), key=lambda index: scores[index])  # stable: the earlier of equals first
    last = len(order) - 1
    ranks = sorted({last * k // (number - 1) for k in range(number)}) if number > 1 else [last // 2]
    names = {last // 2: "median", 0: "worst", last: "best"}
    return [
        (order[rank], f"SBD {scores[order[rank]]:.2f}, {names.get(rank, f'rank {rank + 1}')} of {len(scores)}")
        for rank in ranks
    ]


def write_figure(
    path: Path, chosen: list[tuple[Sample, str]], model: RecurrentInstanceSegmenter, args: argparse.Namespace
) -> None:
    """The picture of ``--figure``: image, network and ground truth of each sample, with its title."""
    from fastris.imageio import write_image
    from fastris.viz import FigureRow, figure_panel

    rows = []
    for sample, title in chosen:
        found = find_instances(model, sample.image, sample.name, args).label_map()
        rows.append(FigureRow(sample.image, found, sample.labels.numpy(), title=f"{title}: {sample.name}"))
    write_image(path, figure_panel(rows))
    print(f"wrote {path}")


def _size(text: str) -> tuple[int, int]:
    parts = [int(part) for part in text.lower().split("x")]
    height, width = parts * 2 if len(parts) == 1 else parts
    if min(height, width) < 1:
        raise ValueError
    return height, width


_size.__name__ = "size (HxW)"
