"""How an operator gets its gradients, and how eager PyTorch calls it in less time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

Call = Callable[..., Any]

_PLAIN = torch.Tensor, torch.nn.Parameter


def with_gradients(
    library: torch.library.Library,
    name: str,
    gradients: Call,
    setup_context: Call,
    kernels: tuple[Call | None, Call | None] = (None, None),
) -> tuple[Call, Call]:
    """Register the gradients of ``torch.ops.fastris.<name>``; its ``<name>_backward`` has none and says so.

    ``kernels`` are those of the two where they are functions of Python, on whatever device.

    Returns:
        The two as functions of positional arguments. Compiled, exported, traced, under ``torch.vmap`` or a dispatch
        mode, and of subclasses of tensors they are the operators; in eager PyTorch they leave out the dispatcher's way
        through Python, which takes as long as a small operator, and with ``kernels`` the operator itself, which a
        profile then does not list. They are not for an operator that returns a list.
    """

    def no_second_gradients(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(f"{name}: the native operator has no second derivatives; use_backend('reference') has")

    torch.library.register_autograd(f"fastris::{name}", gradients, setup_context=setup_context, lib=library)
    torch.library.register_autograd(f"fastris::{name}_backward", no_second_gradients, lib=library)
    forward, backward = kernels
    return (
        _called(name, forward, gradients, setup_context),
        _called(f"{name}_backward", backward, no_second_gradients, lambda ctx, inputs, output: None),
    )


def _called(name: str, kernel: Call | None, gradients: Call, setup_context: Call) -> Call:
    operator = getattr(torch.ops.fastris, name).default

    def below_autograd(*arguments: Any) -> Any:
        run = operator if kernel is None or not plain(arguments) else kernel
        with torch._C._AutoDispatchBelowAutograd():
            return run(*arguments)

    def forward(ctx: Any, *arguments: Any) -> Any:
        output = below_autograd(*arguments)
        setup_context(ctx, arguments, output)
        return output

    backward = {"backward": staticmethod(gradients)}
    methods = {"forward": staticmethod(below_autograd), "setup_context": staticmethod(setup_context), **backward}
    for_functional: Any = type(name, (torch.autograd.Function,), methods)
    # Without a setup_context of its own, apply does not look up the signature of forward, which takes 30 µs.
    function: Any = type(name, (torch.autograd.Function,), {"forward": staticmethod(forward), **backward})

    def call(*arguments: Any) -> Any:
        if not eager():
            return operator(*arguments)
        interpreter = torch._C._functorch.peek_interpreter_stack()
        if not (interpreter is None or interpreter.key() == torch._C._functorch.TransformType.Grad):
            return operator(*arguments)  # no other transformation of torch.func can go through a function of autograd
        differentiated = torch.is_grad_enabled() and any(
            isinstance(one, torch.Tensor) and one.requires_grad for one in arguments
        )
        if not differentiated:
            return below_autograd(*arguments)
        return (function if interpreter is None else for_functional).apply(*arguments)

    return call


def plain(arguments: Iterable[Any]) -> bool:
    """Whether nobody but the kernel has a say in what an operator does with these: no mode, subclass or batching."""
    return torch._C._len_torch_dispatch_stack() == 0 and not any(
        isinstance(one, torch.Tensor) and (type(one) not in _PLAIN or torch._C._functorch.is_legacy_batchedtensor(one))
        for one in arguments
    )


def eager() -> bool:
    """Whether torch.compile, torch.export and torch.jit.trace have no part in what is called."""
    return not torch.compiler.is_compiling() and not torch.jit.is_tracing()


def untransformed() -> bool:
    """Whether in addition nothing of torch.func is under way."""
    return eager() and torch._C._functorch.peek_interpreter_stack() is None
