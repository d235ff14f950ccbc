"""Rotary positions: output and gradient against float64, on every instruction set of this machine."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from luthier.kernels.dispatch import Isa
from luthier.kernels.rope import rope
from luthier.kernels.rope.cpu import rope_op
from luthier.kernels.rope.reference import rope_reference


def inputs(*shape: int) -> list[Tensor]:
    """Of (tokens, heads, size, rotary columns)."""
    tokens, heads, size, rotary = shape
    generator = torch.Generator().manual_seed(size)
    shapes = [(tokens, heads, size), (tokens, rotary), (tokens, rotary)]
    x, cos, sin = (torch.randn(*shape, generator=generator) for shape in shapes)
    return [x.requires_grad_(), cos, sin]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(0, 2, 16, 16), (1, 1, 2, 2), (129, 3, 64, 64), (7, 2, 33, 20), (5, 4, 80, 80)]
)
def test_kernels_are_no_less_exact_than_eager(
    kernels: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    exact_as_eager: Callable[..., None],
    rows_of: Callable[..., tuple[int, ...]],
) -> None:
    given = inputs(*rows_of(kernels, shape))
    exact_as_eager(lambda impl, *given: [rope(*given, impl=impl)], given, dtype)


def test_cpu_takes_heads_before_tokens(isa: Isa) -> None:
    x, cos, sin = (tensor.detach() for tensor in inputs(9, 4, 16, 16))
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(rope(turned, cos, sin, impl="cpu"), rope(x, cos, sin, impl="cpu"))


def test_cpu_bits_do_not_depend_on_threads(
    isa: Isa, gradients: Callable[..., list[Tensor]], same_for_threads: Callable[..., None]
) -> None:
    given = inputs(100, 3, 16, 16)
    same_for_threads(
        lambda: gradients(lambda impl, *some: [rope(*some, impl=impl)], "cpu", given, torch.bfloat16)
    )


def test_op_passes_opcheck() -> None:
    x, cos, sin = inputs(7, 2, 16, 8)
    torch.library.opcheck(rope_op.op, (x, cos, sin, False))


def test_reference_gradient_is_its_derivative() -> None:
    x, cos, sin = (tensor.detach().double() for tensor in inputs(3, 2, 6, 4))
    assert torch.autograd.gradcheck(lambda given: rope_reference(given, cos, sin), x.requires_grad_())


def test_rope_refuses_wrong_inputs() -> None:
    x, cos, sin = (tensor.detach() for tensor in inputs(7, 2, 16, 8))
    with pytest.raises(ValueError, match=r"\(6, 8\)"):
        rope(x, cos[1:], sin[1:])
    with pytest.raises(ValueError, match=r"\(7, 7\)"):
        rope(x, cos[:, 1:], sin[:, 1:])
    with pytest.raises(ValueError, match="bfloat16"):
        rope(x.bfloat16(), cos, sin)
    with pytest.raises(ValueError, match="float64"):
        rope(x.double(), cos.double(), sin.double(), impl="cpu")
