"""Metrics over two Gloo processes are those of one process with all the images; and states, saved and merged."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastris import Instances
from fastris.metrics import AveragePrecisionRegion, CocoMetrics, InstanceMetrics, Metric


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    pytest.importorskip("pycocotools")
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no Gloo")
    store = tmp_path_factory.mktemp("gloo") / "store"
    worker = Path(__file__).with_name("gloo_worker.py")
    processes = [
        subprocess.Popen(
            [sys.executable, str(worker), str(rank), "2", str(store)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, error) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, error
    return [json.loads(out) for out, _ in outputs]


def same(a: Any, b: Any) -> bool:
    """Equal to the last bit, NaN included."""
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


@pytest.mark.parametrize("metric", ["instances", "region", "coco"])
@pytest.mark.parametrize("share", ["uneven", "one empty", "both empty"])
def test_each_process_gets_the_value_over_all_images(reports, share, metric):
    first, second = (report[f"{share}, {metric}"] for report in reports)
    assert same(first["all"], first["expected"])
    assert same(first["all"], second["all"])
    assert same(first["all"], first["again"])  # nothing was counted twice
    assert all(map(math.isnan, first["all"].values())) == (share == "both empty" and metric != "instances")


def test_the_shares_differ_from_the_whole(reports):
    whole = reports[1]["uneven, instances"]["all"]
    assert whole["images"] == 7
    assert reports[1]["unsynced"]["images"] == 2
    assert 0 < whole["apr50"] < 1
    assert reports[1]["unsynced"]["apr50"] != whole["apr50"]


def test_a_process_group_and_no_group_at_all(reports):
    assert same(reports[1]["of its group"], reports[1]["unsynced"])


def test_rows_of_all_processes_in_order_of_rank(reports):
    assert reports[0]["rows"] == reports[1]["rows"] == ["image 0", "image 0"]


def filled(metric: Any, seed: int) -> Any:
    """Add an image of four blocks, one of them void, of which a prediction misses a part each."""
    random = np.random.default_rng(seed)
    target = np.kron(np.array([[1, 2], [3, -1]]), np.ones((6, 6), int))
    masks = (target == np.arange(1, 4)[:, None, None]) & (random.random((3, 12, 12)) > random.random((3, 1, 1)) * 0.6)
    metric.update(Instances(masks, random.random(3), (12, 12)), target)
    return metric


@pytest.mark.parametrize("kind", [InstanceMetrics, AveragePrecisionRegion, CocoMetrics])
class TestState:
    @pytest.fixture(autouse=True)
    def _needs(self, kind: type[Metric]) -> None:
        if kind is CocoMetrics:
            pytest.importorskip("pycocotools")

    def test_saved_and_loaded(self, kind):
        file = io.BytesIO()
        torch.save(filled(filled(kind(), 0), 1).state_dict(), file)
        file.seek(0)
        other = filled(kind(), 2)  # forgotten by loading
        other.load_state_dict(torch.load(file, weights_only=True))
        assert same(other.compute(), filled(filled(kind(), 0), 1).compute())

    def test_merging_is_updating_and_leaves_the_other_alone(self, kind):
        one, other = filled(kind(), 0), filled(kind(), 1)
        before = other.compute()
        one.merge_state(other)
        filled(one, 2)
        assert same(one.compute(), filled(filled(filled(kind(), 0), 1), 2).compute())
        assert same(other.compute(), before)

    def test_gathered_alone_is_a_copy(self, kind):
        metric = filled(kind(), 0)
        before = metric.compute()
        whole = filled(metric.gathered(), 1)
        assert same(metric.compute(), before)
        assert 0 < before.get("ap", before.get("apr", 0)) < 1
        assert same(whole.compute(), filled(filled(kind(), 0), 1).compute())
        assert not same(whole.compute(), before)

    def test_reset(self, kind):
        metric = filled(kind(), 0)
        metric.reset()
        assert same(metric.compute(), kind().compute())

    @pytest.mark.parametrize("state", [{}, {"other": 1}])
    def test_the_state_of_another_class(self, kind, state):
        metric = filled(kind(), 0)
        before = metric.compute()
        with pytest.raises(ValueError, match=rf"{kind.__name__}: expected a state with .*'\w+'"):
            metric.merge_state(state)
        assert same(metric.compute(), before)
