"""``fastris predict``: label maps, overlays, counts and outlines of a user's images."""

from __future__ import annotations

import argparse
import csv
import glob
import json
import os
import warnings
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastris.commands.common import add_model_options, complain, find_instances, load_model
from fastris.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from fastris.instances import Instances
    from fastris.nn.model import RecurrentInstanceSegmenter

HELP = "find, outline and count the objects in images"
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".ppm", ".pgm")
NOT_INPUT = ("_label.png", "_overlay.png", "_steps.png")  # in a folder: label maps, and what an earlier run wrote


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("inputs", nargs="*", metavar="INPUT", help="image files, folders of them, or glob patterns")
    parser.add_argument("--data", action="append", default=[], metavar="PATH", help="one more INPUT")
    parser.add_argument("--out", default="fastris-predict", metavar="DIR", help="where to write (fastris-predict)")
    parser.add_argument("--coco", action="store_true", help="also write coco.json, with RLE masks (needs pycocotools)")
    parser.add_argument(
        "--figure", action="store_true", help="also write *_steps.png: where each step looks, its mask and confidence"
    )
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Predict every image that can be read; 2 if one could not."""
    from fastris.imageio import make_output_directory, read_image, write_image, write_label_map
    from fastris.instances import require_pycocotools

    if args.coco:
        require_pycocotools()
    if args.figure and args.tile:
        raise InputError("--figure: shows the steps of one look at the whole image; leave --tile out")
    inputs = [*args.inputs, *args.data]
    if not inputs:
        raise InputError("predict: expected image files, folders or glob patterns")
    out = make_output_directory(args.out)
    model = load_model(args)
    paths, bad = expand(inputs)
    for error in bad:
        complain(error)
    failed = len(bad)
    rows: list[dict[str, Any]] = []
    coco = Coco() if args.coco else None
    try:
        for path, stem in zip(paths, output_stems(paths), strict=True):
            try:
                image = read_image(path)
                instances = find_instances(model, image, str(path), args)
            except InputError as error:
                complain(error if str(path) in str(error) else f"{path}: {error}")
                failed += 1
                continue
            files = {"label": f"{stem}_label.png", "overlay": f"{stem}_overlay.png"}
            write_label_map(out / files["label"], instances.label_map())
            write_image(out / files["overlay"], instances.plot(image))
            if args.figure:
                files["steps"] = f"{stem}_steps.png"
                write_image(out / files["steps"], draw_steps(model, image, path.name, args))
            rows.append({**instances.summary(), **files})
            if coco:
                coco.add(instances)
            print(f"{path}: {len(instances)}", flush=True)
    finally:  # an interrupted run keeps the lines of what it wrote
        write_rows(out, rows)
        if coco:
            coco.write(out / "coco.json")
    print(f"\n{len(rows)} image{'' if len(rows) == 1 else 's'}, wrote {out}")
    return 2 if failed else 0


def draw_steps(
    model: RecurrentInstanceSegmenter, image: np.ndarray, title: str, args: argparse.Namespace
) -> Image.Image:
    """The picture of ``--figure``; what the model warns about has been said when it predicted."""
    from fastris.viz import step_strip

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return step_strip(model, image, args.max_steps, args.threshold, title)


def expand(inputs: list[str]) -> tuple[list[Path], list[InputError]]:
    """The image files that the inputs mean, each once, in order, and one error for each input that means none."""
    paths: dict[Path, Path] = {}  # by absolute path
    errors = []
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            found = sorted(
                entry
                for entry in path.iterdir()
                if entry.suffix.lower() in SUFFIXES
                and not entry.name.startswith(".")
                and not entry.name.lower().endswith(NOT_INPUT)
            )
            if not found:
                errors.append(InputError(f"{text}: no images in this folder"))
        elif path.exists() or not glob.has_magic(text):
            found = [path]  # a missing file is reported when it is read
        else:
            found = sorted(Path(match) for match in glob.glob(text, recursive=True) if not os.path.isdir(match))
            if not found:
                errors.append(InputError(f"{text}: no file matches this pattern"))
        for one in found:
            paths.setdefault(Path(os.path.abspath(one)), one)
    return list(paths.values()), errors


def output_stems(paths: list[Path]) -> list[str]:
    """A name for the outputs of each image: its stem, with folder and number where stems would collide."""
    count = Counter(path.stem.lower() for path in paths)  # some file systems take A.png for a.png
    taken: set[str] = set()
    stems = []
    for path in paths:
        stem = path.stem
        if count[stem.lower()] > 1:
            folder = Path(os.path.abspath(path)).parent.name
            stem = f"{folder}_{stem}" if folder else stem
        unique, number = stem, 1
        while unique.lower() in taken or (unique != path.stem and unique.lower() in count):
            number += 1
            unique = f"{stem}-{number}"
        taken.add(unique.lower())
        stems.append(unique)
    return stems


def write_rows(out: Path, rows: list[dict[str, Any]]) -> None:
    """predictions.jsonl and predictions.csv: one line an image."""
    from fastris.imageio import atomic_write

    with atomic_write(out / "predictions.jsonl") as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    with (
        atomic_write(out / "predictions.csv") as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["file", "count", "scores", "areas", "boxes"])
        for row in rows:
            instances = row["instances"]
            writer.writerow(
                [
                    row["file"],
                    row["count"],
                    ";".join(str(one["score"]) for one in instances),
                    ";".join(str(one["area"]) for one in instances),
                    ";".join(" ".join(map(str, one["box"])) for one in instances),
                ]
            )


class Coco:
    """A COCO data set in the making: images, and annotations with RLE segmentations and scores."""

    def __init__(self) -> None:
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []

    def add(self, instances: Instances) -> None:
        """Add one image with its instances."""
        height, width = instances.size
        image_id = len(self.images) + 1
        self.images.append({"id": image_id, "file_name": instances.name, "height": height, "width": width})
        for one in instances.to_coco(image_id):
            self.annotations.append({"id": len(self.annotations) + 1, "iscrowd": 0, **one})

    def write(self, path: Path) -> None:
        """Write the JSON file."""
        from fastris.imageio import atomic_write

        content = {
            "images": self.images,
            "categories": [{"id": 1, "name": "object"}],
            "annotations": self.annotations,
        }
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
