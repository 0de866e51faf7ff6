"""One process of ``test_distributed.py``: its share of the images, and as JSON what each metric makes of them.

python gloo_worker.py RANK WORLD_SIZE STORE
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch.distributed as dist

from fastris import Instances
from fastris.metrics import AveragePrecisionRegion, CocoMetrics, InstanceMetrics, Metric

IMAGES = 7
SHARES = {  # images of each rank
    "uneven": ([0, 2, 4, 5, 6], [3, 1]),
    "one empty": ([], [6, 5, 4, 3, 2, 1, 0]),
    "both empty": ([], []),
}
METRICS: dict[str, Callable[..., Metric]] = {
    "instances": InstanceMetrics,
    "region": AveragePrecisionRegion,
    "coco": CocoMetrics,
}


def image(index: int) -> tuple[Instances, np.ndarray]:
    """Nine squares, shifted, in part lost and in part void; few distinct scores, so that images tie."""
    random = np.random.default_rng(index)
    target = np.kron(np.arange(1, 10).reshape(3, 3), np.ones((12, 12), int))
    target[::12] = target[:, ::12] = 0
    pred = np.roll(target, random.integers(0, 5, 2), (0, 1))
    pred[np.isin(pred, random.integers(1, 10, 2))] = 0
    target[random.integers(0, 30) :][:3] = -1
    found = Instances.from_label_map(pred)
    return Instances(found.masks, random.integers(1, 4, len(found)) / 4, found.size), target


def measured(metric: Any, indices: list[int]) -> Any:
    for index in indices:
        pred, target = image(index)
        if isinstance(metric, AveragePrecisionRegion):
            metric.update(pred, target)
        else:
            metric.update(pred, target, name=f"image {index}")
    return metric


def main(rank: int, world_size: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    second = dist.new_group([1])
    report = {}
    for share, indices in SHARES.items():
        for name, metric in METRICS.items():
            mine = measured(metric(), indices[rank])
            report[f"{share}, {name}"] = {
                "all": mine.compute(),
                "again": mine.compute(),
                "expected": measured(metric(sync_on_compute=False), sorted(indices[0] + indices[1])).compute(),
            }
    if rank == 1:  # neither of these may wait for rank 0, which calls neither
        indices = SHARES["uneven"][1]
        alone = {"of its group": {"process_group": second}, "unsynced": {"sync_on_compute": False}}
        report |= {name: measured(InstanceMetrics(**options), indices).compute() for name, options in alone.items()}
    report["rows"] = [row["name"] for row in measured(InstanceMetrics(), SHARES["uneven"][0][:1]).gathered().rows]
    dist.barrier()
    dist.destroy_process_group()
    print(json.dumps(report))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
