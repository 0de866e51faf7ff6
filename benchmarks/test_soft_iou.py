"""``fastris.soft_iou`` on masks and on label maps against einsum, bmm, a loop over pairs and broadcasting."""

from __future__ import annotations

from typing import Any

import pytest

from peers import Peer
from suites import SOFT_IOU, Labels
from timed import check_and_time, parameters


@pytest.mark.parametrize(("labels", "peer"), parameters(SOFT_IOU))
def test_soft_iou(labels: Labels, peer: Peer, benchmark: Any) -> None:
    check_and_time(SOFT_IOU, labels, peer, benchmark)
