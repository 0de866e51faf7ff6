"""Five iterations of a dense CRF: the native lattice against that in torch and against every pair of pixels."""

from __future__ import annotations

from typing import Any

import pytest

from peers import Peer
from suites import DENSE_CRF, Labels
from timed import check_and_time, parameters


@pytest.mark.parametrize(("labels", "peer"), parameters(DENSE_CRF))
def test_crf(labels: Labels, peer: Peer, benchmark: Any) -> None:
    check_and_time(DENSE_CRF, labels, peer, benchmark)
