"""How the CPU face of an operator is called: as a torch op where something watches, else straight.

A small op spends more time in torch's dispatcher than in its kernel: about half a millisecond for a forward and a
backward pass of a LoRA linear. So a plain call, which nobody traces, goes through a bare autograd function.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

_PLAIN = (Tensor, torch.nn.Parameter)
# Which of an operator's arguments are lists of tensors: the number of tensors in each, None for any other.
_Layout = tuple[int | None, ...]


class CpuOp:
    """A torch custom op on the CPU; arguments are tensors, lists of tensors and plain values.

    Attributes:
        op: the op as torch knows it, for compilers, exporters and `torch.library.opcheck`.
        register_fake: decorator for the function that tells the outputs' shapes.
    """

    def __init__(self, name: str, kernel: Callable[..., Any]) -> None:
        self.op = torch.library.custom_op(name, kernel, mutates_args=(), device_types="cpu")
        self.register_fake = self.op.register_fake
        self._name = name
        self._kernel = kernel
        self._function: type[torch.autograd.Function] | None = None

    def register_autograd(self, backward: Callable[..., Any], keep: Callable[..., None]) -> None:
        """Differentiate by `backward(ctx, *grads)` of what `keep(ctx, inputs, output)` kept; autocast to bfloat16.

        Outputs that nothing used have None as gradient. A list of outputs comes as one list of gradients.
        """
        self.op.register_autograd(backward, setup_context=keep)
        torch.library.register_autocast(self._name, "cpu", torch.bfloat16)
        self._function = _function_of(self._kernel, backward, keep)

    def __call__(self, *arguments: Any) -> Any:
        """Run the op."""
        if torch.compiler.is_compiling() or _is_watched(arguments):
            return self.op(*arguments)
        if self._function is None or not torch.is_grad_enabled():
            return self._kernel(*arguments)
        flat, layout = _flattened(arguments)
        return self._function.apply(*flat, layout)  # type: ignore[no-untyped-call]


def cpu_op(name: str) -> Callable[[Callable[..., Any]], CpuOp]:
    """Decorator that makes a `CpuOp` of a kernel's function, whose annotations are the op's schema."""
    return lambda kernel: CpuOp(name, kernel)


def _is_watched(arguments: tuple[Any, ...]) -> bool:
    """Tell whether autocast, a dispatch mode (fake tensors, tracing, counting) or a tensor subclass needs the op."""
    if torch.is_autocast_enabled("cpu") or is_in_torch_dispatch_mode():
        return True
    return any(type(tensor) not in _PLAIN for tensor in _tensors(arguments))


def _tensors(arguments: tuple[Any, ...]) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, list) and argument and isinstance(argument[0], Tensor):
            yield from argument


def _function_of(
    kernel: Callable[..., Any], backward: Callable[..., Any], keep: Callable[..., None]
) -> type[torch.autograd.Function]:
    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(*arguments: Any) -> Any:
            output = kernel(*_nested(arguments[:-1], arguments[-1]))
            return tuple(output) if isinstance(output, list) else output

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.set_materialize_grads(False)
            ctx.layout = inputs[-1]
            keep(ctx, tuple(_nested(inputs[:-1], inputs[-1])), output)

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: Any) -> Any:
            found = backward(ctx, list(grads)) if returns_list else backward(ctx, *grads)
            return (*_spread(found, ctx.layout), None)

    returns_list = kernel.__annotations__["return"] == list[Tensor]
    return Direct


def _flattened(arguments: tuple[Any, ...]) -> tuple[list[Any], _Layout]:
    """The arguments with lists of tensors laid open, for autograd sees no tensor inside a list."""
    flat: list[Any] = []
    layout: list[int | None] = []
    for argument in arguments:
        if isinstance(argument, list) and argument and isinstance(argument[0], Tensor):
            flat += argument
            layout.append(len(argument))
        else:
            flat.append(argument)
            layout.append(None)
    return flat, tuple(layout)


def _nested(flat: tuple[Any, ...], layout: _Layout) -> Iterator[Any]:
    """The arguments that `_flattened` laid open."""
    position = 0
    for count in layout:
        yield flat[position] if count is None else list(flat[position : position + count])
        position += count or 1


def _spread(grads: tuple[Any, ...], layout: _Layout) -> Iterator[Any]:
    """Gradients of nested arguments as those of the flat ones."""
    for grad, count in zip(grads, layout, strict=True):
        if count is None:
            yield grad
        else:
            yield from [None] * count if grad is None else grad
