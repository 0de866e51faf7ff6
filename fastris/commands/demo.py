"""``fastris demo``: the shipped model on the shipped sample images."""

from __future__ import annotations

import argparse
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from fastris.commands.common import add_model_options, find_instances, load_model, table
from fastris.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

HELP = "run the shipped model on the sample images and draw what it finds"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--out", default="fastris-demo", metavar="DIR", help="where to write (fastris-demo)")
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Predict, draw and report."""
    from fastris.imageio import make_output_directory, read_image, read_label_map, write_image, write_label_map
    from fastris.metrics import symmetric_best_dice
    from fastris.viz import contact_sheet, panel

    samples = sample_pairs()
    out = make_output_directory(args.out)
    model = load_model(args)
    panels: list[Image.Image] = []
    rows: list[tuple[str, int, int, float]] = []
    for image_path, label_path in samples:
        image, labels = read_image(image_path), read_label_map(label_path)
        name = image_path.name.removesuffix("_rgb.png")
        instances = find_instances(model, image, name, args)
        found = instances.label_map()
        true_count = len(set(labels.ravel().tolist()) - {0})
        score = symmetric_best_dice(found, labels)
        rows.append((name, len(instances), true_count, score))
        panels.append(panel(image, instances, labels, title=f"{name}   SBD {score:.2f}"))
        write_label_map(out / f"{name}_label.png", found)
    path = out / "demo.png"
    write_image(path, contact_sheet(panels))
    found_total, true_total = sum(row[1] for row in rows), sum(row[2] for row in rows)
    total = ("total, mean SBD", found_total, true_total, sum(row[3] for row in rows) / len(rows))
    print(table(("file", "found", "true", "SBD"), [*rows, total]))
    print(f"\nwrote {path}")
    return 0


def sample_pairs() -> list[tuple[Path, Path]]:
    """The sample images that come with the package, each with its label map."""
    folder = Path(str(resources.files("fastris"))) / "samples"
    images = sorted(folder.glob("*_rgb.png"))
    if not images:
        raise InputError(f"{folder}: no sample images (*_rgb.png) in this installation")
    return [(image, image.with_name(image.name.replace("_rgb.png", "_label.png"))) for image in images]
