"""Write the sample images of fastris/samples from the DSB2018 zip.

    python benchmarks/make_samples.py --data stage1_train.zip

All are held out from training (the validation split); the choice is by eye, for variety.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fastris.data import NucleiDataset
from fastris.imageio import write_image, write_label_map

CHOSEN = {
    "4ff152d7": "sparse, dim fluorescence",
    "eb96fc6c": "bright spots among dim nuclei",
    "6aa7dd0c": "a cluster, wide range of brightness",
    "33d0a9b2": "even fluorescence, nuclei cut by the border",
    "97158b2f": "bright, touching nuclei",
    "6ab24e7e": "stained tissue in bright field, touching nuclei",
}

README = """# Sample images

Six images with {total} nuclei from stage 1 of the [2018 Data Science Bowl](https://www.kaggle.com/c/data-science-bowl-2018)
(image set [BBBC038](https://bbbc.broadinstitute.org/BBBC038) of the Broad Bioimage Benchmark Collection),
dedicated to the public domain under [CC0 1.0](https://creativecommons.org/publicdomain/zero/1.0/). All
belong to the validation split (`fastris.data.in_validation`): no shipped model was trained on them.

`<id>_rgb.png` is the image without its alpha channel, `<id>_label.png` the masks as one 16-bit label map,
0 = background.
`python benchmarks/make_samples.py --data stage1_train.zip` writes this folder.

| file | full id | size | nuclei | what it shows |
|---|---|---|---|---|
{rows}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="DSB2018 stage1_train.zip, or its directory")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "fastris" / "samples")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    dataset = NucleiDataset(arguments.data, "validation")
    rows, total = [], 0
    for short, what in CHOSEN.items():
        sample = dataset[next(i for i, name in enumerate(dataset.names) if name.startswith(short))]
        write_image(arguments.out / f"{short}_rgb.png", sample.image.permute(1, 2, 0).numpy())
        write_label_map(arguments.out / f"{short}_label.png", sample.labels.numpy())
        height, width = sample.size
        rows.append(f"| {short} | `{sample.name}` | {width}×{height} | {sample.count} | {what} |")
        total += sample.count
    (arguments.out / "README.md").write_text(README.format(total=total, rows="\n".join(rows)), encoding="utf-8")


if __name__ == "__main__":
    main()
