"""ConvLSTM gates, cells and sequences against eager loops, TorchScript and a copy; that wrong ones are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

import recurrent
from peers import Peer
from suites import CELL, CONVLSTM, GATES, Labels, Suite
from timed import check_and_time, parameters


@pytest.mark.parametrize(("labels", "peer"), parameters(GATES))
def test_gates(labels: Labels, peer: Peer, benchmark: Any) -> None:
    check_and_time(GATES, labels, peer, benchmark)


@pytest.mark.parametrize(("labels", "peer"), parameters(CELL))
def test_cell(labels: Labels, peer: Peer, benchmark: Any) -> None:
    check_and_time(CELL, labels, peer, benchmark)


@pytest.mark.parametrize(("labels", "peer"), parameters(CONVLSTM))
def test_convlstm(labels: Labels, peer: Peer, benchmark: Any) -> None:
    check_and_time(CONVLSTM, labels, peer, benchmark)


def gates_in_another_order(gates: Tensor, cell_prev: Tensor, addend: Tensor) -> tuple[Tensor, Tensor]:
    return recurrent.eager_gates(gates.roll(1, 1), cell_prev, addend)


def one_step_less(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    outputs, cell = recurrent.naive_sequence(x, weight, bias, recurrent.STEPS - 1)
    return outputs[[0, *range(recurrent.STEPS - 1)]], cell


def not_a_number(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    outputs, cell = recurrent.naive_sequence(x, weight, bias)
    return outputs, cell * float("nan")


def no_gradient_of_bias(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Right results."""
    return recurrent.naive_sequence(x, weight, bias.detach() + 0 * bias)


@pytest.mark.parametrize(
    ("suite", "function", "fault"),
    [
        (GATES, gates_in_another_order, "hidden"),
        (CONVLSTM, one_step_less, "outputs"),
        (CONVLSTM, not_a_number, "cell is off by nan"),
        (CONVLSTM, no_gradient_of_bias, "the gradient of bias"),
    ],
)
def test_a_wrong_peer_is_refused(suite: Suite, function: Callable[..., Any], fault: str) -> None:
    labels = next(one for one in suite.grid if suite.quick(one) and one["pass"] != "forward")
    case = suite.build(labels)
    assert fault in case.fault(Peer("wrong", "0", lambda problem: problem.run(function)))
    right = next(peer for peer in suite.peers(labels) if peer.name == suite.base)
    assert case.fault(right) == ""
