"""How an operator is called: as a torch op where something watches, else straight.

A small op spends more time in torch's dispatcher than in its kernel: about half a millisecond for a forward and a
backward pass of a LoRA linear. So a plain call, which nobody traces, goes through a bare autograd function.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from luthier.kernels.dequantise import dense, is_quantised

Face = Literal["cpu", "triton"]
"""Whose kernels run: C++ or Triton."""
Kernel = TypeVar("Kernel", bound=Callable[..., Any])
_PLAIN = (Tensor, torch.nn.Parameter)
# Which of an operator's arguments are lists of tensors: the number of tensors in each, None for any other.
_Layout = tuple[int | None, ...]
_face: ContextVar[Face | None] = ContextVar("luthier_kernel_face", default=None)


class KernelOp:
    """A torch custom op with kernels in C++ and, once `on_gpu` or `on_gpu_with_codes` was called, in Triton.

    Arguments are tensors, lists of tensors and plain values. Tensors on a GPU take the Triton kernel. Where a kernel in
    C++, or one of `on_gpu_with_codes`, takes a frozen weight, it may be quantised; all else is given what `dense` makes
    of it.

    Attributes:
        op: the op as torch knows it, for compilers, exporters and `torch.library.opcheck`.
        register_fake: decorator for the function that tells the outputs' shapes.
    """

    def __init__(self, name: str, kernel: Callable[..., Any]) -> None:
        self.op = torch.library.custom_op(name, kernel, mutates_args=(), device_types="cpu")
        self.register_fake = self.op.register_fake
        self._name = name
        self._kernels: dict[Face, Callable[..., Any]] = {"cpu": kernel}
        self._with_codes: set[Face] = {"cpu"}
        self._returns_list = kernel.__annotations__["return"] == list[Tensor]
        self._function: type[torch.autograd.Function] | None = None

    def load_triton(self) -> None:
        """Import the module beside the C++ kernels' that holds the Triton kernels."""
        if "triton" not in self._kernels:
            importlib.import_module(self._kernels["cpu"].__module__.removesuffix("cpu") + "triton")

    def on_gpu(self, kernel: Kernel) -> Kernel:
        """Decorator that makes a function the op's Triton kernel."""
        self._kernels["triton"] = kernel
        self.op.register_kernel("cuda", kernel)
        return kernel

    def on_gpu_with_codes(self, kernel: Kernel) -> Kernel:
        """As `on_gpu`, of a kernel that takes quantised weights as they are."""
        self._with_codes.add("triton")
        return self.on_gpu(kernel)

    def register_autograd(self, backward: Callable[..., Any], keep: Callable[..., None]) -> None:
        """Differentiate by `backward(ctx, *grads)` of what `keep(ctx, inputs, output)` kept; autocast to bfloat16.

        Outputs that nothing used have None as gradient. A list of outputs comes as one list of gradients.
        """
        self.op.register_autograd(backward, setup_context=keep)
        for device_type in ("cpu", "cuda"):
            torch.library.register_autocast(self._name, device_type, torch.bfloat16)
        self._function = self._function_of(backward, keep)

    def __call__(self, *arguments: Any) -> Any:
        """Run the op; within `running_on`, with the kernels asked for there."""
        flat, layout = _flattened(arguments)
        if is_watched(flat):
            return self.op(*_dense(arguments))
        if not torch.is_grad_enabled():
            return self._run(arguments)
        if self._function is None:
            # A backward op in a pass that is to be differentiated itself: torch says that there is no such thing.
            return self.op(*arguments)
        return self._function.apply(*flat, layout)  # type: ignore[no-untyped-call]

    def _run(self, arguments: tuple[Any, ...]) -> Any:
        face = _face.get() or _face_of(arguments)
        return self._kernels[face](*(arguments if face in self._with_codes else _dense(arguments)))

    def _function_of(
        self, backward: Callable[..., Any], keep: Callable[..., None]
    ) -> type[torch.autograd.Function]:
        returns_list = self._returns_list
        run = self._run

        class Direct(torch.autograd.Function):
            # With a setup_context beside it, torch would inspect the signature of forward at every call. Without, it
            # refuses the transforms of torch.func, as it does for custom ops.
            @staticmethod
            def forward(ctx: Any, *arguments: Any) -> Any:
                ctx.set_materialize_grads(False)
                ctx.layout = arguments[-1]
                ctx.face = _face.get()
                inputs = tuple(_nested(arguments[:-1], arguments[-1]))
                output = run(inputs)
                output = tuple(output) if returns_list else output
                keep(ctx, inputs, output)
                return output

            @staticmethod
            @once_differentiable
            def backward(ctx: Any, *grads: Any) -> Any:
                with running_on(ctx.face):
                    found = backward(ctx, list(grads)) if returns_list else backward(ctx, *grads)
                return (*_spread(found, ctx.layout), None)

        # A profile shows a function by its class's name, and that of what undoes it by the same.
        return type(self._name.rpartition("::")[2], (Direct,), {})


def kernel_op(name: str) -> Callable[[Callable[..., Any]], KernelOp]:
    """Decorator that makes a `KernelOp` of a C++ kernel's function, whose annotations are the op's schema."""
    return lambda kernel: KernelOp(name, kernel)


def run(chosen: str, op: KernelOp, *arguments: Any) -> Any:
    """Run an op with the kernels, cpu or triton, that `resolve` chose."""
    if chosen == "cpu":
        return op(*arguments)
    op.load_triton()
    if _face_of(arguments) == "triton":
        return op(*arguments)
    with running_on("triton"):
        return op(*arguments)


@contextmanager
def running_on(face: Face | None) -> Iterator[None]:
    """Let ops called in the block, and their backward passes later, take the kernels of `face`; None: by device.

    Triton's kernels run on tensors in main memory only in Triton's interpreter.
    """
    token = _face.set(face)
    try:
        yield
    finally:
        _face.reset(token)


def _face_of(arguments: tuple[Any, ...]) -> Face:
    return "triton" if next(_tensors(arguments)).device.type == "cuda" else "cpu"


def is_watched(flat: Sequence[Any]) -> bool:
    """Tell whether a compiler, autocast, a dispatch mode (fake tensors, counting) or a tensor subclass needs the op.

    Such a call is given the numbers of quantised weights.
    """
    if torch.compiler.is_compiling():
        return True
    tensors = [one for one in flat if isinstance(one, Tensor)]
    if is_in_torch_dispatch_mode() or torch.is_autocast_enabled(tensors[0].device.type):
        return True
    return any(type(one) not in _PLAIN and not is_quantised(one) for one in tensors)


def _dense(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with what quantised weights stand for."""
    return tuple(
        [dense(one) for one in argument]
        if isinstance(argument, list) and argument and isinstance(argument[0], Tensor)
        else dense(argument)
        if isinstance(argument, Tensor)
        else argument
        for argument in arguments
    )


def _tensors(arguments: tuple[Any, ...]) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, list) and argument and isinstance(argument[0], Tensor):
            yield from argument


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
