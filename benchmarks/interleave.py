"""Times that can be compared on a noisy machine: contestants take turns in one process.

A clock that drifts, a neighbour that wakes up or a cache that fills hits every contestant of a round alike, so that the
ratio of two times *of the same round* is worth more than the ratio of two medians. Only such ratios are reported.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from math import ceil
from typing import NamedTuple

Samples = dict[int, float]
"""Seconds by round."""


class Spread(NamedTuple):
    """Quartiles."""

    low: float
    median: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Quartiles of at least one value."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    return Spread(*statistics.quantiles(values, n=4, method="inclusive"))


def interleave(
    calls: Mapping[str, Callable[[], object]], rounds: int, patience: float = 0.5, least: float = 0.005
) -> dict[str, Samples]:
    """Time every call once a round.

    The order rotates from round to round and is reversed in every other one, so that nobody always runs first or
    always behind the same one. Warm the calls up before.

    Args:
        calls: contestants by name.
        rounds: how often the quick ones run.
        least: seconds; a quicker call runs so often in a row that it takes this long, and its sample is the mean. Else
            its first microseconds, in which caches and branch prediction still know the contestant before it, would
            weigh more than those of a slow one.
        patience: seconds; what took longer in the first round runs only so often that it takes about this long per
            round on average, but at least three times.

    Returns:
        Seconds of every contestant by round; compare contestants with :func:`ratio`.
    """
    names = list(calls)
    samples: dict[str, Samples] = {name: {} for name in names}
    every = dict.fromkeys(names, 1)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds if names else 0):
            first = number % len(names)
            order = names[first:] + names[:first]
            for name in reversed(order) if number % 2 else order:
                if number % every[name]:
                    continue
                samples[name][number] = _seconds(calls[name], least)
            if number == 0:
                seldom = max(1, (rounds - 1) // 2)
                for name in names:
                    every[name] = min(seldom, max(1, ceil(samples[name][0] / patience)))
    finally:
        if collecting:
            gc.enable()
    return samples


def _seconds(call: Callable[[], object], least: float) -> float:
    """The mean of as many calls in a row as take at least so long."""
    start, calls, elapsed = time.perf_counter(), 0, 0.0
    while calls == 0 or elapsed < least:
        call()
        calls += 1
        elapsed = time.perf_counter() - start
    return elapsed / calls


def ratio(samples: Samples, base: Samples) -> Spread:
    """How many times as long as ``base``, over the rounds that both ran in."""
    return spread([seconds / base[number] for number, seconds in samples.items() if number in base])
