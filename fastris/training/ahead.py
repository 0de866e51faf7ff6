"""Batches made ahead by worker processes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from fastris.data import Batch
from fastris.errors import InputError


def batches_ahead(batch: Callable[[int], Batch], steps: range, workers: int) -> Iterator[Batch]:
    """``batch(step)`` for every step, in order, made by forked processes that are two batches ahead each.

    Forked, they share what the data set has decoded by then. They do not change what comes: that is ``batch``'s.

    Raises:
        InputError: not on Linux; or as ``batch`` raises it, when the step's turn comes.
    """
    if sys.platform != "linux":
        raise InputError(f"workers: they are forked, which is safe on Linux only; use 0 on {sys.platform}")
    loader = DataLoader(
        _Batches(batch),
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        multiprocessing_context="fork",
        generator=torch.Generator(),  # the global one is the model's, which must not depend on the workers
    )
    for one in loader:
        if isinstance(one, InputError):
            raise one
        yield one


class _Batches(Dataset["Batch | InputError"]):
    """An InputError is an item here: raised in a worker, it would come with a traceback in its message."""

    def __init__(self, batch: Callable[[int], Batch]) -> None:
        self.batch = batch

    def __getitem__(self, step: int) -> Batch | InputError:
        try:
            return self.batch(step)
        except InputError as error:
            return error
