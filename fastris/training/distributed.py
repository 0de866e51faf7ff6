"""One model trained by several processes, as torchrun starts them; without torchrun there is one process.

Every rank makes the whole batch of a step, which is a function of seed and step, and trains on its own part of it.
torch's DistributedDataParallel averages the gradients while backward still runs. It asks that every parameter has a
gradient on every rank in every step: so no rank may be without images, and the loss must see the same number of labels
on all.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastris.data import Batch
from fastris.errors import InputError

T = TypeVar("T")


@contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """Join the processes that torchrun started, by NCCL on CUDA and by Gloo elsewhere, for a block.

    Yields:
        The device of this process: ``cuda`` without a number becomes that of the process's rank on its machine.

    Raises:
        InputError: more processes on this machine than GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    on_cuda = device.type == "cuda"
    if on_cuda and device.index is None:
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= count:
            raise InputError(f"--nproc-per-node: expected at most one process for each of {count} GPUs on this machine")
        device = torch.device("cuda", local)
    if on_cuda:
        torch.cuda.set_device(device)  # where NCCL gathers objects
    dist.init_process_group("nccl" if on_cuda else "gloo", device_id=device if on_cuda else None)
    yield device
    dist.destroy_process_group()  # not after an error: it would wait for ranks that wait for this one


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def main_process() -> bool:
    """Whether this is the process that writes and reports."""
    return rank() == 0


def parallel(model: nn.Module) -> nn.Module:
    """`model` itself, or a wrapper of it whose backward averages the gradients over ranks."""
    return DistributedDataParallel(model) if world_size() > 1 else model


def own_part(batch: Batch) -> Batch:
    """Every ``world_size()``-th image of a batch from number ``rank()`` on, padded as they were."""
    mine = slice(rank(), None, world_size())
    return replace(
        batch,
        images=batch.images[mine],
        labels=batch.labels[mine],
        counts=batch.counts[mine],
        names=batch.names[mine],
        sizes=batch.sizes[mine],
    )


def total(values: Tensor) -> Tensor:
    """The sum of a tensor over ranks, the same bits on all of them."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def gather(items: list[T]) -> list[T]:
    """The items of all ranks, those of rank 0 first."""
    if world_size() == 1:
        return items
    parts: list[list[T]] = [[] for _ in range(world_size())]
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def wait_for_all() -> None:
    """Go on when all ranks are here."""
    if world_size() > 1:
        dist.barrier()
