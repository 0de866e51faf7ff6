"""One comparison for all projects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [tensor for part in result for tensor in flat(part)]


@pytest.fixture
def assert_same_module() -> Callable[..., None]:
    """Load ``original``'s state_dict into ``module``, and compare results and all gradients in fp64."""

    def check(original: nn.Module, module: nn.Module, *inputs: Any) -> None:
        original.double()
        module.double().load_state_dict(original.state_dict(), strict=True)
        leaves = [tensor.double().requires_grad_() for tensor in flat(inputs)]
        copies = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        expected, got = flat(original(*rebuild(inputs, leaves))), flat(module(*rebuild(inputs, copies)))
        torch.testing.assert_close(got, expected)
        weights = [torch.randn_like(tensor) for tensor in expected]
        torch.autograd.backward(expected, weights)
        torch.autograd.backward(got, weights)
        torch.testing.assert_close([copy.grad for copy in copies], [leaf.grad for leaf in leaves])
        theirs = {name: parameter.grad for name, parameter in original.named_parameters()}
        for name, parameter in module.named_parameters():
            if theirs[name] is None:
                assert parameter.grad is None, name
            else:
                torch.testing.assert_close(parameter.grad, theirs[name], msg=lambda text, name=name: f"{name}: {text}")

    return check


def rebuild(structure: Any, leaves: list[Tensor]) -> Any:
    """``structure`` with its tensors replaced by ``leaves`` in order."""
    remaining = iter(leaves)

    def replace(part: Any) -> Any:
        return next(remaining) if isinstance(part, Tensor) else type(part)(replace(inner) for inner in part)

    return replace(structure)
