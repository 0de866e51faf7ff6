"""The Triton kernels of soft_iou, run by Triton's interpreter on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")


def version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")[:2]))


works_here = pytest.mark.skipif(
    version(triton.__version__) < (3, 7) and version(np.__version__) >= (2, 4),
    reason="the interpreter of Triton 3.6 makes scalars of arrays of one element, which NumPy 2.4 refuses",
)

CODE = """
import sys
import torch
from fastris.ops import soft_iou_triton
from fastris.reference.soft_iou import soft_iou_and_union, soft_iou_backward

dtype = getattr(torch, sys.argv[1])
tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-3, "atol": 1e-3}
torch.manual_seed(0)
SIZES = (2, 3, 4, 5, 7), (1, 1, 1, 1, 1), (1, 33, 18, 9, 11), (2, 3, 2, 0, 4), (1, 3, 34, 40, 64)
for number, (batch, preds, targets, height, width) in enumerate(SIZES):
    pred = torch.rand(batch, preds, height, width).to(dtype)
    labels = torch.randint(-2, targets + 3, (batch, height, width))
    masks = torch.rand(batch, targets, height, width).to(dtype)
    counts = torch.randint(-1, preds + 2, (batch,)), torch.randint(-1, targets + 2, (batch,))
    weight = torch.randn(batch, preds, targets) * (torch.rand(batch, preds, targets) < 0.5)
    offset = torch.randn(batch, preds)
    channels_last = masks.contiguous(memory_format=torch.channels_last)
    given = [
        (labels, (None, None)),
        (masks, (None, counts[1])),
        (channels_last, counts),
        (labels.int(), counts),
        (masks > 0.5, (counts[0], None)),
        (masks.mT.contiguous().mT, counts),
    ]
    for target, used in given if number == 0 else given[number % 3 :: 3]:  # the interpreter is slow
        found = soft_iou_triton.soft_iou(pred, target, *used, targets)
        expected = soft_iou_and_union(pred, target, *used, targets)
        for ours, truth in zip(found, expected):
            torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-6)
        gradient = soft_iou_triton.soft_iou_backward(weight, offset, target, dtype)
        torch.testing.assert_close(gradient, soft_iou_backward(weight, offset, target, dtype), **tolerance)
"""


def interpret(*arguments: str | Path) -> None:
    """Runs Python with these arguments, and kernels in Triton's interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@works_here
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_kernels_match_the_reference_in_the_interpreter(dtype: str) -> None:
    """bf16 is left to a GPU: the interpreter computes it wrongly."""
    interpret("-c", CODE, dtype)


PARTS = """
import torch
import triton
import triton.language as tl
from fastris.kernels.soft_iou import high_and_low


@triton.jit
def parts_of(value, high, low, N: tl.constexpr):
    x = tl.arange(0, N)
    one, other = high_and_low(tl.load(value + x))
    tl.store(high + x, one)
    tl.store(low + x, other)


def in_11_bits(value):
    return (value.view(torch.int32) & -0x2000).view(torch.float32)


torch.manual_seed(0)
value = torch.randn(4096) * torch.logspace(-30, 30, 4096)
value[:6] = torch.tensor([0.0, 1.0, -1.0, 1 / 3, float("inf"), float("nan")])
high, low = torch.empty_like(value), torch.empty_like(value)
parts_of[(1,)](value, high, low, N=4096)
assert not torch.isfinite(low[4:6]).any()  # so that no sum hides it
value, high, low = (torch.cat([one[:4], one[6:]]) for one in (value, high, low))
assert torch.equal(high, in_11_bits(high)) and torch.equal(high + low, value)
error = high.double() + in_11_bits(low).double() - value.double()
assert (error.abs() <= 2.0**-23 * value.abs()).all()
assert (low * value.sign() < 0).float().mean() > 0.4  # either sign: what is cut does not add up
"""


@works_here
def test_a_value_is_the_sum_of_two_of_tf32(tmp_path: Path) -> None:
    path = tmp_path / "parts.py"  # Triton reads the source of a kernel
    path.write_text(PARTS)
    interpret(path)
