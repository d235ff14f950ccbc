"""Gated activations: outputs and gradients against float64, on every instruction set of this machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.kernels.dispatch import Isa
from luthier.kernels.gated_activation import gated, geglu, swiglu
from luthier.kernels.gated_activation.cpu import gated_activation_op
from luthier.kernels.gated_activation.reference import gated_reference


def inputs(*shape: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(shape))
    return [(torch.randn(*shape, generator=generator) * scale).requires_grad_() for _ in range(2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", [swiglu, geglu])
@pytest.mark.parametrize("shape", [(0, 16), (1, 1), (7, 33), (129, 100), (2, 3, 64)])
@pytest.mark.parametrize("scale", [0.05, 1.0, 30.0])
def test_kernels_are_no_less_exact_than_eager(
    kernels: str,
    dtype: torch.dtype,
    function: Any,
    shape: tuple[int, ...],
    scale: float,
    exact_as_eager: Any,
    rows_of: Any,
) -> None:
    given = inputs(*rows_of(kernels, shape), scale=scale)
    exact_as_eager(lambda impl, *given: [function(*given, impl=impl)], given, dtype)


def test_cpu_takes_halves_of_one_tensor(isa: Isa) -> None:
    joined = torch.randn(9, 64)
    gate, up = joined.chunk(2, dim=-1)
    assert torch.equal(swiglu(gate, up, impl="cpu"), swiglu(gate.contiguous(), up.contiguous(), impl="cpu"))


def test_cpu_bits_do_not_depend_on_threads(
    isa: Isa, gradients: Callable[..., list[Tensor]], same_for_threads: Callable[..., None]
) -> None:
    given = inputs(100, 33)
    same_for_threads(
        lambda: gradients(lambda impl, *some: [geglu(*some, impl=impl)], "cpu", given, torch.bfloat16)
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_cpu_carries_what_is_no_number(isa: Isa, value: float) -> None:
    gate, up = (tensor.detach() for tensor in inputs(3, 20))
    gate[1, 4], up[2, 5] = value, value
    output = swiglu(gate, up, impl="cpu")
    assert not output[1, 4].isfinite()
    assert not output[2, 5].isfinite()
    assert output.isfinite().sum() == 58


def test_op_passes_opcheck() -> None:
    gate, up = inputs(7, 16)
    torch.library.opcheck(gated_activation_op.op, (gate, up, False))
    torch.library.opcheck(gated_activation_op.op, (gate.detach().T.contiguous().T.requires_grad_(), up, True))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_reference_gradient_is_its_derivative(activation: str) -> None:
    given = [tensor.detach().double().requires_grad_() for tensor in inputs(3, 5)]
    assert torch.autograd.gradcheck(lambda gate, up: gated_reference(gate, up, activation), given)


def test_gated_refuses_wrong_inputs() -> None:
    gate, up = (tensor.detach() for tensor in inputs(3, 5))
    with pytest.raises(ValueError, match=r"\(3, 4\)"):
        swiglu(gate, up[:, 1:])
    with pytest.raises(ValueError, match="bfloat16"):
        swiglu(gate.bfloat16(), up)
    with pytest.raises(ValueError, match="relu"):
        gated(gate, up, "relu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="float64"):
        swiglu(gate.double(), up.double(), impl="cpu")
