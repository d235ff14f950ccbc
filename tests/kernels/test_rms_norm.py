"""Root-mean-square norm: output and gradient against float64, on every instruction set of this machine."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from luthier.kernels.dispatch import Isa
from luthier.kernels.rms_norm import rms_norm
from luthier.kernels.rms_norm.cpu import rms_norm_op
from luthier.kernels.rms_norm.reference import rms_norm_reference


def inputs(*shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(shape))
    return [
        torch.randn(*shape, generator=generator).requires_grad_(),
        torch.rand(shape[-1], generator=generator),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 16), (1, 3), (7, 33), (129, 576), (2, 3, 4, 64)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_kernels_are_no_less_exact_than_eager(
    kernels: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    offset: float,
    exact_as_eager: Callable[..., None],
    rows_of: Callable[..., tuple[int, ...]],
) -> None:
    run = lambda impl, x, weight: [rms_norm(x, weight, 1e-5, offset=offset, impl=impl)]  # noqa: E731
    exact_as_eager(run, inputs(*rows_of(kernels, shape)), dtype)


def test_cpu_bits_do_not_depend_on_threads(
    isa: Isa, gradients: Callable[..., list[Tensor]], same_for_threads: Callable[..., None]
) -> None:
    run = lambda impl, x, weight: [rms_norm(x, weight, 1e-5, impl=impl)]  # noqa: E731
    same_for_threads(lambda: gradients(run, "cpu", inputs(100, 33), torch.bfloat16))


def test_cpu_takes_strided_rows(isa: Isa) -> None:
    x, weight = (tensor.detach() for tensor in inputs(20, 33))
    wide = torch.full((20, 40), float("nan"))
    wide[:, 3:36] = x
    assert torch.equal(
        rms_norm(wide[:, 3:36], weight, 1e-5, impl="cpu"), rms_norm(x, weight, 1e-5, impl="cpu")
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_cpu_makes_a_row_that_overflows_no_number_and_leaves_the_others(isa: Isa, value: float) -> None:
    x, weight = (tensor.detach() for tensor in inputs(5, 33))
    x[3, 32] = value
    output = rms_norm(x, weight, 1e-5, impl="cpu")
    assert output[3].isnan().all()
    assert output[[0, 1, 2, 4]].isfinite().all()


def test_op_passes_opcheck() -> None:
    x, weight = inputs(7, 16)
    torch.library.opcheck(rms_norm_op.op, (x, weight, 1e-5, 0.0))
    torch.library.opcheck(rms_norm_op.op, (x.detach().T.contiguous().T.requires_grad_(), weight, 1e-5, 1.0))


def test_reference_gradient_is_its_derivative() -> None:
    x, weight = (tensor.detach().double().requires_grad_() for tensor in inputs(3, 5))
    assert torch.autograd.gradcheck(lambda one, other: rms_norm_reference(one, other, 1e-5, 1.0), (x, weight))


def test_auto_trains_the_weight_through_eager() -> None:
    x, weight = inputs(3, 5)
    rms_norm(x, weight.requires_grad_(), 1e-5).sum().backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    with pytest.raises(ValueError, match="requires_grad=True"):
        rms_norm(x, weight, 1e-5, impl="cpu")


def test_rms_norm_refuses_wrong_inputs() -> None:
    x, weight = (tensor.detach() for tensor in inputs(3, 5))
    with pytest.raises(ValueError, match=r"\(4,\)"):
        rms_norm(x, weight[1:], 1e-5)
    with pytest.raises(ValueError, match="bfloat16"):
        rms_norm(x.bfloat16(), weight, 1e-5)
    with pytest.raises(ValueError, match="float64"):
        rms_norm(x.double(), weight.double(), 1e-5, impl="cpu")
