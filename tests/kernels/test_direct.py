"""Calls past the dispatcher give what calls through it give, and step aside where something watches."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from luthier.kernels.direct import KernelOp
from luthier.kernels.gated_activation.cpu import gated_activation_op
from luthier.kernels.linear.cpu import linear_op
from luthier.kernels.lora_linear import Projection, lora_linear_multi
from luthier.kernels.lora_linear.cpu import lora_linear_op
from luthier.kernels.rms_norm.cpu import rms_norm_op


def leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_()


Case = tuple[KernelOp, list[Any], int]
"""An op, its arguments, and how many of its outputs have a gradient."""


def norm() -> Case:
    return rms_norm_op, [leaf(7, 16), torch.randn(16).bfloat16(), 1e-5, 0.0], 1


def gate() -> Case:
    return gated_activation_op, [leaf(5, 24), leaf(5, 24), True], 1


def lora() -> Case:
    weights = [torch.randn(n, 16).bfloat16() for n in (8, 24)]
    factors = [leaf(r, 16, dtype=torch.float32) for r in (4, 3)]
    factors += [leaf(n, r, dtype=torch.float32) for n, r in ((8, 4), (24, 3))]
    biases = [leaf(8), torch.empty(0, dtype=torch.bfloat16)]
    return lora_linear_op, [leaf(9, 16), weights, biases, factors, [2.0, 0.5, 0.1], [1, 2, 3]], 2


def plain() -> Case:
    return linear_op, [leaf(9, 16), leaf(8, 16), leaf(8)], 1


CASES = pytest.mark.parametrize("case", [norm, gate, lora, plain])


def leaves(arguments: list[Any]) -> list[Tensor]:
    flat = [one for argument in arguments for one in (argument if isinstance(argument, list) else [argument])]
    return [one for one in flat if isinstance(one, Tensor) and one.requires_grad]


def outputs_and_gradients(run: Callable[..., Any], arguments: list[Any], count: int) -> list[Tensor]:
    outputs = listed(run(*arguments))
    generator = torch.Generator().manual_seed(3)
    grads = [torch.randn(one.shape, generator=generator).to(one.dtype) for one in outputs[:count]]
    return [*outputs, *torch.autograd.grad(outputs[:count], leaves(arguments), grads)]


def listed(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


class Names(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down which ops torch sees."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_transforms_of_torch_func_are_refused() -> None:
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x: rms_norm_op(x, torch.randn(16).bfloat16(), 1e-5, 0.0)[0].float().sum())(
            leaf(7, 16).detach()
        )


@CASES
def test_a_direct_call_has_the_bits_of_the_op(case: Callable[[], Case]) -> None:
    op, arguments, count = case()
    direct = outputs_and_gradients(op, arguments, count)
    through = outputs_and_gradients(op.op, arguments, count)
    assert len(direct) == len(through) > len(leaves(arguments))
    assert all(map(torch.equal, direct, through))


@CASES
def test_without_gradients_a_direct_call_has_the_bits_of_the_op(
    case: Callable[[], Case],
) -> None:
    op, arguments, _ = case()
    with torch.no_grad():
        direct, through = listed(op(*arguments)), listed(op.op(*arguments))
    assert not any(one.requires_grad for one in direct)
    assert all(map(torch.equal, direct, through))


@CASES
def test_a_second_derivative_is_refused(case: Callable[[], Case]) -> None:
    op, arguments, _ = case()
    output = listed(op(*arguments))[0]
    (grad, *_) = torch.autograd.grad(output.float().square().sum(), leaves(arguments)[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.float().square().sum().backward()  # type: ignore[no-untyped-call]


@CASES
def test_a_dispatch_mode_sees_the_op(case: Callable[[], Case]) -> None:
    op, arguments, _ = case()
    op(*arguments)
    with Names() as names:
        op(*arguments)
    assert str(op.op._opoverload) in names.seen


def test_autocast_casts_what_an_op_is_given() -> None:
    op, arguments, _ = norm()
    arguments[:2] = [arguments[0].detach().float(), arguments[1].float()]
    assert op(*arguments)[0].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert op(*arguments)[0].dtype == torch.bfloat16


def test_a_compiled_call_has_the_bits_of_a_direct_one() -> None:
    weight, a, b = torch.randn(8, 16), leaf(4, 16, dtype=torch.float32), leaf(8, 4, dtype=torch.float32)
    x = leaf(9, 16, dtype=torch.float32)

    def run(given: Tensor) -> Tensor:
        return lora_linear_multi(given, [Projection(weight=weight, a=a, b=b, scale=2.0)], impl="cpu")[0]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = []
    for function in (run, compiled):
        output = function(x)
        results.append([output, *torch.autograd.grad(output.square().sum(), [x, a, b])])
    assert all(map(torch.equal, *results))


def test_an_output_that_nothing_uses_has_a_gradient_of_zero() -> None:
    op, arguments, _ = lora()
    first, *_ = op(*arguments)
    _, _, _, factors, *_ = arguments
    grads = torch.autograd.grad(first.float().sum(), [*factors], allow_unused=True)
    assert grads[0].abs().sum() > 0
    assert torch.equal(grads[1], torch.zeros_like(grads[1]))
    assert torch.equal(grads[3], torch.zeros_like(grads[3]))


@CASES
@pytest.mark.parametrize("device", ["meta"])
def test_memory_for_cpp_is_in_main_memory_whatever_the_default_device(
    case: Callable[[], Case], device: str
) -> None:
    op, arguments, count = case()
    want = outputs_and_gradients(op, arguments, count)
    with torch.device(device):
        outputs = listed(op(*arguments))
    grads = [torch.ones_like(one) for one in outputs[:count]]
    with torch.device(device):
        found = torch.autograd.grad(outputs[:count], leaves(arguments), grads)
    assert all(map(torch.equal, outputs, want[: len(outputs)]))
    assert {one.device.type for one in found} == {"cpu"}


def test_a_backward_pass_is_not_differentiated_in_silence() -> None:
    op, arguments, _ = gate()
    with torch.autocast("cpu", torch.bfloat16):
        output = listed(op(*arguments))[0]
    (first,) = torch.autograd.grad(output.float().sum(), arguments[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        torch.autograd.grad(first.float().sum(), arguments[1])
