"""What the metrics over a data set share: a state that can be saved, merged and gathered from all processes."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, TypeVar

import torch.distributed as dist

M = TypeVar("M", bound="Metric")


class Metric(ABC):
    """A metric over many images, with the methods of torchmetrics: `update`, `compute`, `reset`, `merge_state`.

    Where a process group of :mod:`torch.distributed` is there, :meth:`compute` is a collective: all processes call it,
    and each gets the value over the images of all of them. The state is counts and per-image values, so this is the
    value that one process would find, whatever the shares. An image that two processes have seen counts twice, as the
    ones do that `DistributedSampler` adds to make the shares even: give each process `range(rank, n, world_size)`.

    Args:
        sync_on_compute: False for the value over the images of this process alone, which no other has to wait for.
        process_group: the processes to gather from; the default group where not given.
    """

    def __init__(self, sync_on_compute: bool = True, process_group: dist.ProcessGroup | None = None) -> None:
        self.sync_on_compute = sync_on_compute
        self.process_group = process_group
        self.reset()

    @abstractmethod
    def reset(self) -> None:
        """Forget all images."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The state as tensors and plain values, for a checkpoint that `torch.load` reads with `weights_only`."""

    @abstractmethod
    def _merge(self, state: Mapping[str, Any]) -> None:
        """Add the images of a state with all its keys."""

    @abstractmethod
    def _value(self) -> dict[str, float]:
        """The metric over the images of this process."""

    def compute(self) -> dict[str, float]:
        """The metric over the images of all processes; the state stays as it is."""
        return (self.gathered() if self.sync_on_compute else self)._value()

    def gathered(self: M) -> M:
        """A metric that holds the images of all processes, in order of rank; a copy of this one where it is alone."""
        states = [self.state_dict()]
        if dist.is_available() and dist.is_initialized():
            states *= dist.get_world_size(self.process_group)
            dist.all_gather_object(states, self.state_dict(), self.process_group)
        whole = copy.copy(self)
        whole.reset()
        for state in states:
            whole.merge_state(state)
        return whole

    def merge_state(self, other: Metric | Mapping[str, Any]) -> None:
        """Add the images of another metric of this class, or of its state.

        Raises:
            ValueError: the state of another class.
        """
        state = other.state_dict() if isinstance(other, Metric) else other
        expected = self.state_dict().keys()
        if state.keys() != expected:
            raise ValueError(
                f"{type(self).__name__}: expected a state with {sorted(expected)}, got {sorted(state.keys())}"
            )
        self._merge(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            ValueError: the state of another class.
        """
        self.reset()
        self.merge_state(state)
