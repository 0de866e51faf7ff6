"""with_gradients: an operator called around the dispatcher does what the operator does."""

from __future__ import annotations

import io
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastris import backend
from fastris.ops.conv2d_same import conv2d_same
from fastris.ops.group_norm_relu import group_norm_relu
from fastris.ops.lstm_gates import lstm_gates

pytestmark = pytest.mark.skipif(backend.native_error() is not None, reason="fastris._C is not built")


@pytest.fixture
def inputs() -> tuple[Tensor, ...]:
    sizes = ((4, 8, 16, 16), (12, 8, 3, 3), (12,), (12,))
    return tuple(torch.randn(size).requires_grad_() for size in sizes)


def called(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return group_norm_relu(conv2d_same(x, weight), scale, shift, 3)


def through_the_dispatcher(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    y = torch.ops.fastris.conv2d_same(x, weight, None, 1)
    return torch.ops.fastris.group_norm_relu(y, scale, shift, 3, 1e-5)[0]


def test_results_and_gradients_are_the_same_to_the_bit(inputs: tuple[Tensor, ...]) -> None:
    y, expected = called(*inputs), through_the_dispatcher(*inputs)
    grad = torch.randn_like(y)
    found, truth = ((one, *torch.autograd.grad(one, inputs, grad)) for one in (y, expected))
    assert all(torch.equal(one, other) for one, other in zip(found, truth, strict=True))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(called(*inputs), expected) and not called(*inputs).requires_grad
    assert not called(*(one.detach() for one in inputs)).requires_grad


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(inputs: tuple[Tensor, ...], reentrant: bool) -> None:
    y = torch.utils.checkpoint.checkpoint(called, *inputs, use_reentrant=reentrant)
    y.square().sum().backward()
    expected = torch.autograd.grad(called(*inputs).square().sum(), inputs)
    assert all(torch.equal(one.grad, other) for one, other in zip(inputs, expected, strict=True))


def test_functional_gradients(inputs: tuple[Tensor, ...]) -> None:
    found = torch.func.grad(lambda x: called(x, *inputs[1:]).square().sum())(inputs[0].detach())
    (expected,) = torch.autograd.grad(called(*inputs).square().sum(), inputs[0])
    assert torch.equal(found, expected)


def test_vmap(inputs: tuple[Tensor, ...]) -> None:
    x, weight = inputs[:2]
    found = torch.vmap(lambda one: conv2d_same(one, weight))(torch.stack([x, 2 * x]).detach())
    assert torch.equal(found[0], conv2d_same(x, weight)) and torch.equal(found[1], conv2d_same(2 * x, weight))


def test_a_trace_can_be_saved(inputs: tuple[Tensor, ...]) -> None:
    traced = torch.jit.trace(called, inputs, check_trace=False)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    assert torch.equal(torch.jit.load(file)(*inputs), called(*inputs))


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_the_operators(inputs: tuple[Tensor, ...]) -> None:
    expected = torch.autograd.grad(called(*inputs).square().sum(), inputs)
    with _Recorder() as mode:
        found = torch.autograd.grad(called(*inputs).square().sum(), inputs)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    for name in ("conv2d_same", "conv2d_same_backward", "group_norm_relu", "group_norm_relu_backward"):
        assert getattr(torch.ops.fastris, name).default in mode.seen


def gates_and_convolution(inputs: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor]]:
    gates, cell = torch.randn(2, 12, 5, 4, requires_grad=True), torch.randn(2, 3, 5, 4)
    return [(lstm_gates(gates, cell)[0], gates), (conv2d_same(*inputs[:2]), inputs[1])]


def test_batches_of_gradients(inputs: tuple[Tensor, ...]) -> None:
    for y, x in gates_and_convolution(inputs):
        grads = torch.randn(3, *y.shape)
        (found,) = torch.autograd.grad(y, x, grads, is_grads_batched=True, retain_graph=True)
        for one, grad in zip(found, grads, strict=True):
            torch.testing.assert_close(one, torch.autograd.grad(y, x, grad, retain_graph=True)[0])


def test_a_subclass_of_tensors_sees_the_operators() -> None:
    gates, cell = torch.randn(2, 12, 5, 4), torch.randn(2, 3, 5, 4)
    hidden, next_cell = lstm_gates(TwoTensor(gates, 2 * gates), TwoTensor(cell, cell))
    assert isinstance(hidden, TwoTensor) and isinstance(next_cell, TwoTensor)
    assert torch.equal(hidden.a, lstm_gates(gates, cell)[0]) and torch.equal(hidden.b, lstm_gates(2 * gates, cell)[0])


def test_an_operator_has_gradients_without_the_extension() -> None:
    code = """
    import sys
    sys.modules["fastris._C"] = None
    import torch
    import fastris
    from fastris.ops import lstm_gates

    gates, cell = torch.randn(2, 12, 5, 4, requires_grad=True), torch.randn(2, 3, 5, 4)
    found, expected = (
        torch.autograd.grad(call(gates, cell, None, None, None)[0].square().sum(), gates)[0]
        for call in (torch.ops.fastris.lstm_gates, fastris.reference.lstm_gates)
    )
    torch.testing.assert_close(found, expected)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
