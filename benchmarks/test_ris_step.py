"""A training step of the default model: the native back end against the reference."""

from __future__ import annotations

from typing import Any

import pytest

from peers import Peer
from suites import RIS_STEP, Labels
from timed import check_and_time, parameters


@pytest.mark.parametrize(("labels", "peer"), parameters(RIS_STEP))
def test_ris_step(labels: Labels, peer: Peer, benchmark: Any) -> None:
    check_and_time(RIS_STEP, labels, peer, benchmark)
