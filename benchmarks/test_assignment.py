"""``fastris.assignment`` against SciPy, lap, lapx, lapjv and torch-linear-assignment; what a call and a thread cost."""

from __future__ import annotations

from typing import Any

import pytest

from peers import Peer
from suites import ASSIGNMENT, OVERHEAD, SCALING, Labels
from timed import check_and_time, parameters


@pytest.mark.parametrize(("labels", "peer"), parameters(ASSIGNMENT))
def test_assignment(labels: Labels, peer: Peer, benchmark: Any) -> None:
    check_and_time(ASSIGNMENT, labels, peer, benchmark)


@pytest.mark.parametrize(("labels", "peer"), parameters(OVERHEAD))
def test_overhead_of_a_call(labels: Labels, peer: Peer, benchmark: Any) -> None:
    check_and_time(OVERHEAD, labels, peer, benchmark)


@pytest.mark.parametrize(("labels", "peer"), parameters(SCALING))
def test_scaling_with_threads(labels: Labels, peer: Peer, benchmark: Any) -> None:
    check_and_time(SCALING, labels, peer, benchmark)
