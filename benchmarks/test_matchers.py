"""fastris' matchers against DETR's, Mask2Former's and RIS' as they are usually written."""

from __future__ import annotations

from typing import Any

import pytest

from peers import Peer
from suites import MATCHERS, Labels
from timed import check_and_time, parameters


@pytest.mark.parametrize(("labels", "peer"), parameters(MATCHERS))
def test_matchers(labels: Labels, peer: Peer, benchmark: Any) -> None:
    check_and_time(MATCHERS, labels, peer, benchmark)
