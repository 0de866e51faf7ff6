"""Padding into batches."""

from __future__ import annotations

import pytest
import torch

from fastris.data import VOID, LeavesDataset, Sample, collate
from fastris.errors import InputError


def sample(height: int, width: int, count: int, name: str = "") -> Sample:
    labels = torch.zeros(height, width, dtype=torch.int32)
    labels.view(-1)[:count] = torch.arange(1, count + 1, dtype=torch.int32)
    return Sample(torch.full((3, height, width), 255, dtype=torch.uint8), labels, name)


def test_sizes_and_counts_may_differ():
    batch = collate([sample(5, 9, 3, "a"), sample(17, 2, 0, "b")])
    assert batch.images.shape == (2, 3, 24, 16)
    assert batch.labels.shape == (2, 24, 16)
    assert (batch.images.dtype, batch.labels.dtype, batch.counts.dtype) == (
        torch.float32,
        torch.int64,
        torch.int64,
    )
    assert batch.counts.tolist() == [3, 0]
    assert batch.names == ["a", "b"]
    assert batch.sizes == [(5, 9), (17, 2)]
    assert (batch.images[0, :, :5, :9] == 1).all()
    assert batch.images.sum() == 3 * (5 * 9 + 17 * 2)
    assert batch.labels[0].max() == 3
    assert (batch.labels[0, :5, :9] >= 0).all()
    assert (batch.labels == VOID).sum() == 2 * 24 * 16 - (5 * 9 + 17 * 2)
    assert len(batch) == 2


def test_void_stays_void():
    one = sample(4, 4, 2)
    one.labels[3, 3] = VOID
    assert torch.equal(collate([one], 4).labels[0], one.labels.long())


@pytest.mark.parametrize(("multiple", "expected"), [(1, 65), (8, 72), (32, 96)])
def test_multiple(multiple, expected):
    assert collate([sample(65, 65, 1)], multiple).images.shape[-2:] == (expected, expected)


def test_to_moves_the_tensors_and_keeps_the_rest():
    batch = collate([sample(4, 4, 1, "a")]).to("meta")
    assert {tensor.device.type for tensor in (batch.images, batch.labels, batch.counts)} == {"meta"}
    assert batch.names == ["a"]


@pytest.mark.parametrize(("samples", "multiple"), [([], 8), ([sample(4, 4, 1)], 0)])
def test_wrong_arguments(samples, multiple):
    with pytest.raises(InputError, match="collate"):
        collate(samples, multiple)


@pytest.mark.parametrize("workers", [0, 2])
def test_in_a_data_loader(workers):
    loader = torch.utils.data.DataLoader(
        LeavesDataset(5, size=24), batch_size=2, collate_fn=collate, num_workers=workers
    )
    batches = list(loader)
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert batches[0].images.shape == (2, 3, 24, 24)
