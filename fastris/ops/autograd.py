"""How an operator gets its gradients, and how eager PyTorch calls it in less time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Call = Callable[..., Any]


def with_gradients(
    library: torch.library.Library, name: str, gradients: Call, setup_context: Call
) -> tuple[Call, Call]:
    """Register the gradients of ``torch.ops.fastris.<name>``; its ``<name>_backward`` has none and says so.

    Returns:
        The two as functions of positional arguments. Compiled, exported, traced and under ``torch.vmap`` they are the
        operators; in eager PyTorch they leave out the dispatcher's way through Python, which takes as long as a small
        operator. They are not for an operator that returns a list.
    """

    def no_second_gradients(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(f"{name}: the native operator has no second derivatives; use_backend('reference') has")

    torch.library.register_autograd(f"fastris::{name}", gradients, setup_context=setup_context, lib=library)
    torch.library.register_autograd(f"fastris::{name}_backward", no_second_gradients, lib=library)
    return _called(name, gradients, setup_context), _called(f"{name}_backward", no_second_gradients)


def _called(name: str, gradients: Call, setup_context: Call = lambda ctx, inputs, output: None) -> Call:
    operator = getattr(torch.ops.fastris, name).default

    def below_autograd(*arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    function: Any = type(
        name,
        (torch.autograd.Function,),
        {
            "forward": staticmethod(below_autograd),
            "setup_context": staticmethod(setup_context),
            "backward": staticmethod(gradients),
        },
    )

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or _transformed():
            return operator(*arguments)
        differentiated = torch.is_grad_enabled() and any(
            isinstance(one, torch.Tensor) and one.requires_grad for one in arguments
        )
        return function.apply(*arguments) if differentiated else below_autograd(*arguments)

    return call


def _transformed() -> bool:
    """Whether a transformation of torch.func is under way that cannot go through a function of autograd."""
    interpreter = torch._C._functorch.peek_interpreter_stack()
    return interpreter is not None and interpreter.key() != torch._C._functorch.TransformType.Grad
