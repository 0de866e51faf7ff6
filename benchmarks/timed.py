"""Suites as pytest-benchmark tests: one per case and peer, grouped by case, each checked before it is timed.

    pytest benchmarks/ --benchmark-disable          the checks only, in seconds
    pytest benchmarks/ --benchmark-only             and the times of the quick selection
    FASTRIS_BENCHMARKS=full pytest benchmarks/ …    of all cases, which takes hours

pytest-benchmark times one contestant after the other; ratios between them are report.py's business.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

import pytest

from peers import Peer
from suites import SUITES, Case, Labels, Suite


def parameters(suite: Suite) -> list[Any]:
    """(labels, peer) of every test of a suite."""
    full = os.environ.get("FASTRIS_BENCHMARKS") == "full"
    return [
        pytest.param(labels, peer, id="-".join([*labels.values(), peer.name.replace(" ", "_")]))
        for labels in suite.grid
        if full or suite.quick(labels)
        for peer in suite.peers(labels)
    ]


def check_and_time(suite: Suite, labels: Labels, peer: Peer, benchmark: Any) -> None:
    """Fail on a wrong answer; time one pass over the distinct inputs of the case otherwise."""
    if peer.missing:
        pytest.skip(f"{peer.name}: {peer.missing}")
    case = _case(suite.name, tuple(labels.items()))
    fault = case.fault(peer)
    if fault:
        pytest.fail(f"{peer.name} {peer.version} is not timed, its answer is wrong: {fault}")
    benchmark.group = " ".join([suite.name, *labels.values()])
    benchmark.extra_info.update(labels, peer=peer.name, version=peer.version, items=case.items, item=suite.item)
    benchmark(case.run, peer)


@lru_cache(maxsize=1)
def _case(suite: str, labels: tuple[tuple[str, str], ...]) -> Case:
    return SUITES[suite].build(dict(labels))
