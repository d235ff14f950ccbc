"""Attention of packed sequences: forward and gradients against float64, on every instruction set of this machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.kernels.attention_varlen import attention_varlen
from luthier.kernels.attention_varlen.cpu import attention_varlen_op
from luthier.kernels.attention_varlen.reference import attention_varlen_reference
from luthier.kernels.dispatch import Isa


def heads(bounds: list[int], shape: tuple[int, int, int], seed: int = 0) -> list[Tensor]:
    """Query, key and value of (query heads, key heads, head size)."""
    generator = torch.Generator().manual_seed(seed)
    query_heads, key_heads, size = shape
    return [
        torch.randn(bounds[-1], count, size, generator=generator).requires_grad_()
        for count in (query_heads, key_heads, key_heads)
    ]


def runner(bounds: list[int], **options: Any) -> Callable[..., list[Tensor]]:
    def run(impl: Any, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        return [attention_varlen(query, key, value, bounds, impl=impl, **options)]

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("bounds", "shape", "options"),
    [
        ([0, 1], (1, 1, 1), {}),
        ([0, 1, 8, 8, 137, 300], (3, 1, 64), {}),
        ([0, 0, 7, 7], (4, 2, 24), {}),
        ([0, 130], (2, 2, 80), {"scale": 0.3}),
        ([0, 70, 400], (4, 2, 33), {"window": 50}),
        ([0, 65, 200], (2, 1, 128), {"softcap": 5.0}),
        ([0, 1100], (1, 1, 16), {"window": 7, "softcap": 2.0}),
    ],
)
def test_cpu_is_no_less_exact_than_eager(
    isa: Isa,
    dtype: torch.dtype,
    bounds: list[int],
    shape: tuple[int, int, int],
    options: dict[str, Any],
    exact_as_eager: Callable[..., None],
) -> None:
    exact_as_eager(runner(bounds, **options), heads(bounds, shape), dtype)


def test_cpu_of_no_tokens_is_empty(isa: Isa) -> None:
    query, key, value = (tensor.bfloat16() for tensor in heads([0, 0], (2, 1, 16)))
    assert attention_varlen(query, key, value, [0, 0], impl="cpu").shape == (0, 2, 16)
    assert attention_varlen(query, key, value, [0], impl="eager").shape == (0, 2, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_bits_depend_neither_on_threads_nor_on_other_sequences(
    isa: Isa,
    dtype: torch.dtype,
    gradients: Callable[..., list[Tensor]],
    same_for_threads: Callable[..., None],
) -> None:
    bounds = [0, 100, 399, 420]
    inputs = heads(bounds, (4, 2, 40))
    same_for_threads(lambda: gradients(runner(bounds), "cpu", inputs, dtype))
    together = gradients(runner(bounds), "cpu", inputs, dtype)
    # The gradient of the output must be the same for the part: one of ones would be too simple, so it is sliced.
    alone_inputs = [tensor.detach()[100:399].requires_grad_() for tensor in inputs]
    cast = [tensor.detach().to(dtype).requires_grad_() for tensor in alone_inputs]
    output = attention_varlen(cast[0], cast[1], cast[2], [0, 299], impl="cpu")
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(together[0].shape, generator=generator).to(dtype)[100:399]
    alone = [output.detach(), *torch.autograd.grad(output, cast, weight)]
    for whole, part in zip(together, alone, strict=True):
        assert torch.equal(whole[100:399], part)


def test_cpu_takes_views_that_lie_apart_and_askew(isa: Isa, gradients: Callable[..., list[Tensor]]) -> None:
    bounds = [0, 33, 90]
    inputs = heads(bounds, (4, 2, 16))
    want = gradients(runner(bounds), "cpu", inputs, torch.bfloat16)

    def apart(tensor: Tensor) -> Tensor:
        wide = torch.full((tensor.shape[1], tensor.shape[0] + 1, tensor.shape[2] + 3), float("nan"))
        view = wide.to(tensor.dtype).transpose(0, 1)[1:, :, 1:-2]
        view.copy_(tensor)
        return view

    views = [apart(tensor.detach().bfloat16()) for tensor in inputs]
    assert not views[0].is_contiguous()
    assert torch.equal(attention_varlen(views[0], views[1], views[2], bounds, impl="cpu"), want[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_cpu_keeps_what_is_no_number_within_its_sequence(isa: Isa, value: float) -> None:
    bounds = [0, 60, 130]
    query, key, values = (tensor.detach().bfloat16() for tensor in heads(bounds, (2, 1, 16)))
    query[80, 0, 3] = value
    output = attention_varlen(query, key, values, bounds, impl="cpu")
    assert output[80, 0].isnan().all()
    assert output[:60].isfinite().all()
    assert output[80, 1].isfinite().all()
    assert output[81:].isfinite().all()


def test_op_passes_opcheck() -> None:
    bounds = [0, 5, 12]
    inputs = heads(bounds, (4, 2, 8))
    torch.library.opcheck(attention_varlen_op.op, (*inputs, bounds, [0.5, 0.0], 0))
    askew = [
        tensor.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for tensor in inputs
    ]
    torch.library.opcheck(attention_varlen_op.op, (*askew, bounds, [0.5, 3.0], 4))


@pytest.mark.parametrize("options", [(0.5, 0.0, 0), (0.7, 2.0, 3)])
def test_reference_gradient_is_its_derivative(options: tuple[float, float, int]) -> None:
    inputs = [tensor.detach().double().requires_grad_() for tensor in heads([0, 1, 5], (4, 2, 2))]
    assert torch.autograd.gradcheck(
        lambda q, k, v: attention_varlen_reference(q, k, v, [0, 1, 5], *options), inputs
    )


def test_autocast_computes_in_bfloat16() -> None:
    query, key, value = heads([0, 9], (2, 1, 8))
    with torch.autocast("cpu", torch.bfloat16):
        assert attention_varlen(query, key, value, [0, 9], impl="cpu").dtype == torch.bfloat16


def test_attention_varlen_refuses_wrong_inputs() -> None:
    query, key, value = (tensor.detach() for tensor in heads([0, 9], (4, 2, 8)))
    with pytest.raises(ValueError, match=r"rise from 0 to 9, got \(0, 8\)"):
        attention_varlen(query, key, value, [0, 8])
    with pytest.raises(ValueError, match=r"\(0, 6, 4, 9\)"):
        attention_varlen(query, key, value, [0, 6, 4, 9])
    with pytest.raises(ValueError, match=r"\(9, 3, 8\)"):
        attention_varlen(query[:, :3], key, value, [0, 9])
    with pytest.raises(ValueError, match=r"\(9, 2, 7\)"):
        attention_varlen(query, key[..., 1:], value, [0, 9])
    with pytest.raises(ValueError, match="float64"):
        attention_varlen(query, key, value.double(), [0, 9])
    with pytest.raises(ValueError, match="float64"):
        attention_varlen(query.double(), key.double(), value.double(), [0, 9], impl="cpu")
    with pytest.raises(ValueError, match="meta"):
        attention_varlen(query.to("meta"), key.to("meta"), value.to("meta"), [0, 9], impl="cpu")
    with pytest.raises(ValueError, match="-1"):
        attention_varlen(query, key, value, [0, 9], window=-1)
    with pytest.raises(ValueError, match="fast"):
        attention_varlen(query, key, value, [0, 9], impl="fast")  # type: ignore[arg-type]
