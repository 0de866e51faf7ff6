"""How accurate the native operators must be, and memory that tells whether anybody reads it before it is written."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

ENOUGH = 1000
"""Elements from which the root mean square of rounding errors is steady."""


@pytest.fixture
def no_worse_than_eager() -> Callable[..., None]:
    """check(found, eager, exact): each error against fp64 is at most twice that of eager PyTorch in the same dtype.

    That holds for the root mean square and the largest. Both are given one rounding of the largest value on top, for
    among few elements eager may be exact by chance; among many, the root mean square is given nothing. After a
    `recurrence` the largest does not count: that amplifies the error of each element by a factor of its own, and which
    one has the largest is chance. Errors up to `saturation` are none.
    """

    def check(
        found: Sequence[Tensor],
        eager: Sequence[Tensor],
        exact: Sequence[Tensor],
        *,
        saturation: float = 0.0,
        recurrence: bool = False,
    ) -> None:
        for number, (ours, theirs, truth) in enumerate(zip(found, eager, exact, strict=True)):
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), number
            if truth.numel() == 0:
                continue
            truth = truth.detach()
            our_errors, their_errors = (one.detach().double() - truth for one in (ours, theirs))
            allowed = torch.finfo(ours.dtype).eps * truth.abs().max() + saturation
            if not recurrence:
                assert our_errors.abs().max() <= 2 * their_errors.abs().max() + allowed, number
            if truth.numel() >= ENOUGH:
                allowed = saturation
            assert our_errors.square().mean().sqrt() <= 2 * their_errors.square().mean().sqrt() + allowed, number

    return check


@pytest.fixture
def poisoned_memory() -> Callable[[], AbstractContextManager[None]]:
    """A context in which new memory is full of NaN."""

    @contextmanager
    def poisoned() -> Iterator[None]:
        fills = torch.utils.deterministic.fill_uninitialized_memory
        deterministic = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        try:
            assert torch.empty(9).isnan().all() and torch.zeros(3).new_empty(9, dtype=torch.bfloat16).isnan().all()
            yield
        finally:
            torch.utils.deterministic.fill_uninitialized_memory = fills
            torch.use_deterministic_algorithms(deterministic)

    return poisoned


@pytest.fixture
def by_threads() -> Callable[..., list[Any]]:
    """by_threads(call, *counts): what a call gives with each number of torch's threads, 1 and 2 where none are said."""

    def results(call: Callable[[], Any], *counts: int) -> list[Any]:
        before = torch.get_num_threads()
        try:
            found = []
            for number in counts or (1, 2):
                torch.set_num_threads(number)
                found.append(call())
            return found
        finally:
            torch.set_num_threads(before)

    return results


@pytest.fixture
def at_simd_level() -> Callable[[str, str], None]:
    """run(level, code): Python code in a process whose processor has no more instructions than those of the level."""

    def run(level: str, code: str) -> None:
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": level}
        command = [sys.executable, "-c", textwrap.dedent(code)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr

    return run
