"""``fastris evaluate``: the metrics of a model on a labelled data set."""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastris.commands.common import (
    add_model_options,
    complain,
    find_instances,
    image_size,
    load_model,
    positive_integer,
    table,
)
from fastris.errors import InputError

if TYPE_CHECKING:
    from fastris.data import Sample
    from fastris.nn.model import RecurrentInstanceSegmenter

HELP = "measure a model on labelled images"

# Columns of the printed tables, and their keys in what is computed.
METRICS = {
    **{"SBD": "sbd", "FBD": "fbd", "DiC": "signed_dic", "|DiC|": "dic"},
    **{"mAP": "map", "AP@0.5": "ap50", "images": "images"},
}
REGION = {**{f"@0.{k}": f"apr{k}0" for k in range(5, 10)}, "mean": "apr", "vol": "apr_vol"}
COCO = {
    **{"AP": "ap", "AP50": "ap50", "AP75": "ap75", "AP_S": "ap_small", "AP_M": "ap_medium", "AP_L": "ap_large"},
    **{"AR1": "ar1", "AR10": "ar10", "AR100": "ar100", "AR_S": "ar_small", "AR_M": "ar_medium", "AR_L": "ar_large"},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "--data",
        required=True,
        metavar="PATH",
        help="DSB2018 zip or folder, folder of *_rgb.png and *_label.png, folder of CVPPP, Pascal VOC, Cityscapes or "
        "COCO, COCO JSON file, or 'leaves' (generated)",
    )
    parser.add_argument("--data-class", metavar="NAME", help="only objects of this class, such as person (all)")
    parser.add_argument(
        "--split", choices=("train", "validation", "all"), default="validation", help="which images (validation)"
    )
    parser.add_argument("--max-instances", type=positive_integer, metavar="N", help="only images with at most N")
    parser.add_argument("--size", type=image_size, metavar="HxW", help="only images of this size, such as 256x256")
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
    parser.add_argument(
        "--coco", action="store_true", help="also COCO's AP and AR, and its JSON files (needs pycocotools)"
    )
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Predict every image, print the tables, write evaluate.json and evaluate.csv; 2 if an image could not be read."""
    from fastris.data import open_dataset
    from fastris.imageio import make_output_directory
    from fastris.instances import require_pycocotools
    from fastris.metrics import CocoMetrics, InstanceMetrics

    if args.coco:
        require_pycocotools()
    out = make_output_directory(args.out)
    options: dict[str, Any] = {key: getattr(args, key) for key in ("data_class", "max_instances", "size")}
    if args.seed is not None:
        if Path(args.data).exists() or args.data.partition(":")[0] != "leaves":
            raise InputError(f"--seed: only generated data ('leaves') has a seed, not {args.data}")
        options["seed"] = args.seed
    dataset = open_dataset(args.data, args.split, **{key: value for key, value in options.items() if value is not None})
    model = load_model(args)
    metrics = InstanceMetrics()
    coco = CocoMetrics() if args.coco else None
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
        metrics.update(instances, sample.labels, sample.name)
        if coco:
            coco.update(instances, sample.labels, sample.name)
        measured.append(index)
    if not metrics.rows:
        raise InputError(f"{args.data}: no image to evaluate in split '{args.split}' with these options")

    settings = {
        key: getattr(args, key)
        for key in (
            *("data", "data_class", "split", "max_instances", "size", "seed"),
            *("weights", "threshold", "max_steps", "tile", "overlap", "crf"),
        )
    }
    means = metrics.compute()
    tables = [("model", METRICS, means), ("AP^r", REGION, means)]
    report = {"settings": settings, "metrics": means, "failed": failed, "images": metrics.rows}
    written = [out / "evaluate.json", out / "evaluate.csv"]
    if coco:
        numbers = coco.compute()
        tables.append(("COCO", COCO, numbers))
        report["coco"] = {key: None if math.isnan(value) else value for key, value in numbers.items()}
        written += [out / "coco-ground-truth.json", out / "coco-results.json"]
        _write_json(written[2], coco.ground_truth())
        _write_json(written[3], coco.results())
    _write_json(written[0], report, indent=1)
    _write_rows(written[1], metrics.rows)
    for title, columns, values in tables:
        print(table((title, *columns), [(args.weights, *[values[key] for key in columns.values()])]) + "\n")
    print(f"wrote {', '.join(map(str, written))}")
    if args.figure:
        chosen = spread([row["sbd"] for row in metrics.rows], args.figure)
        write_figure(out / "figure.png", [(dataset[measured[row]], title) for row, title in chosen], model, args)
    return 2 if failed else 0


def _write_json(path: Path, content: Any, indent: int | None = None) -> None:
    from fastris.imageio import atomic_write

    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """One line an image."""
    from fastris.imageio import atomic_write

    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


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
    """The picture of ``--figure``: image, network, CRF if asked, and ground truth of each sample, with its title."""
    from fastris.imageio import write_image
    from fastris.viz import FigureRow, figure_panel

    rows = []
    for sample, title in chosen:
        found = find_instances(model, sample.image, sample.name, args, refine=False).label_map()
        refined = find_instances(model, sample.image, sample.name, args).label_map() if args.crf else None
        truth = sample.labels.numpy()
        rows.append(FigureRow(sample.image, found, truth, refined, title=f"{title}: {sample.name}"))
    write_image(path, figure_panel(rows))
    print(f"wrote {path}")
