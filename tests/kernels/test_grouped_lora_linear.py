"""Many adapters in one batch: against float64, and with the bits of each adapter alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from luthier.kernels.dispatch import Isa
from luthier.kernels.grouped_lora_linear import LoraAdapter, Segment, grouped_lora_linear
from luthier.kernels.grouped_lora_linear.cpu import grouped_lora_linear_backward_op, grouped_lora_linear_op
from luthier.kernels.lora_linear import Dropout, Projection, lora_linear

SEGMENTS = [
    Segment(num_rows=5, adapter=1, seed=7, row0=2**33),
    Segment(num_rows=0, adapter=0),
    Segment(num_rows=9, adapter=-1),
    Segment(num_rows=130, adapter=2, seed=2**40 + 1, stream=3),
    Segment(num_rows=1, adapter=0, seed=3),
    Segment(num_rows=12, adapter=1, seed=7, row0=5),
]
RANKS = [8, 33, 1, 16]  # the last adapter has no rows
DROPOUTS = [0.0, 0.0, 0.25, 0.0]


def tensors(rows: int, inputs: int = 65, outputs: int = 70, ranks: Sequence[int] = RANKS) -> list[Tensor]:
    """x, weight, bias, then A and B of each adapter; weight and bias are frozen."""
    generator = torch.Generator().manual_seed(rows)

    def random(*shape: int, learnt: bool = True) -> Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_(learnt)

    made = [random(rows, inputs), random(outputs, inputs, learnt=False), random(outputs, learnt=False)]
    for rank in ranks:
        made += [random(rank, inputs), random(outputs, rank)]
    return made


def adapters_of(factors: Sequence[Tensor], dropouts: Sequence[float]) -> list[LoraAdapter]:
    return [
        LoraAdapter(a=factors[2 * index], b=factors[2 * index + 1], scale=0.5 + index, dropout=dropout)
        for index, dropout in enumerate(dropouts)
    ]


def runner(segments: Sequence[Segment], dropouts: Sequence[float]) -> Callable[..., list[Tensor]]:
    def run(impl: Any, x: Tensor, weight: Tensor, bias: Tensor, *factors: Tensor) -> list[Tensor]:
        adapters = adapters_of(factors, dropouts)
        used = {one.adapter for one in segments if one.num_rows}
        # Adapters without rows get no gradient from eager.
        unused = sum(
            (one.a.sum() + one.b.sum() for index, one in enumerate(adapters) if index not in used),
            start=x.new_zeros(()),
        )
        return [grouped_lora_linear(x, weight, bias, adapters, segments, impl=impl) + 0.0 * unused]

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropouts", [[0.0] * 4, DROPOUTS])
def test_kernels_are_no_less_exact_than_eager(
    kernels: str, dtype: torch.dtype, dropouts: list[float], exact_as_eager: Callable[..., None]
) -> None:
    exact_as_eager(runner(SEGMENTS, dropouts), tensors(157), dtype)


@pytest.mark.parametrize("segments", [[], [Segment(num_rows=0, adapter=0)]])
def test_no_rows_give_no_output_and_zero_gradients(
    kernels: str, segments: list[Segment], gradients: Callable[..., list[Tensor]], device: str
) -> None:
    output, *grads = gradients(runner(segments, DROPOUTS), kernels, tensors(0), torch.float32, device)
    assert output.shape == (0, 70)
    assert len(grads) == 9
    assert not any(grad.any() for grad in grads)


def test_an_adapter_without_a_finite_number_leaves_the_rows_of_others_alone(
    kernels: str, gradients: Callable[..., list[Tensor]], device: str
) -> None:
    inputs = tensors(157)
    good = gradients(runner(SEGMENTS, DROPOUTS), kernels, inputs, torch.float32, device)
    with torch.no_grad():
        inputs[3 + 2 * 2].fill_(torch.nan)  # A and B of the adapter of rows 14 to 143
        inputs[4 + 2 * 2].fill_(torch.inf)
    with numpy.errstate(invalid="ignore"):  # the interpreter's
        bad = gradients(runner(SEGMENTS, DROPOUTS), kernels, inputs, torch.float32, device)
    own = slice(14, 144)
    for index in (0, 1):  # the output and the gradient of x
        assert bad[index][own].isnan().any()
        for rows in (slice(own.start), slice(own.stop, None)):
            assert torch.equal(bad[index][rows], good[index][rows])
    others = [2, 3, 4, 5, 8, 9]
    assert all(torch.equal(bad[index], good[index]) for index in others)


@pytest.mark.parametrize("ranks", [[8, 16], [130, 70]])
def test_gradients_of_an_adapter_with_many_rows_are_summed_over_all(
    kernels: str, ranks: list[int], exact_as_eager: Callable[..., None]
) -> None:
    segments = [
        Segment(num_rows=300, adapter=1, seed=1),
        Segment(num_rows=20, adapter=0, seed=2),
        Segment(num_rows=290, adapter=1, seed=3),
    ]
    inputs = tensors(610, inputs=36, outputs=40, ranks=ranks)
    exact_as_eager(runner(segments, [0.0, 0.5]), inputs, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_in_a_batch_has_the_bits_of_the_adapter_alone(isa: Isa, dtype: torch.dtype) -> None:
    x, weight, bias, *factors = tensors(157)
    x = x.detach().to(dtype).requires_grad_()
    weight, bias = weight.to(dtype), bias.to(dtype)
    adapters = adapters_of(factors, DROPOUTS)
    output = grouped_lora_linear(x, weight, bias, adapters, SEGMENTS, impl="cpu")
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    output.backward(grad)  # type: ignore[no-untyped-call]
    first = 0
    alone: dict[int, list[list[Tensor]]] = {}
    for segment in SEGMENTS:
        rows = slice(first, first + segment.num_rows)
        first += segment.num_rows
        if segment.adapter < 0 or not segment.num_rows:
            continue
        one = adapters[segment.adapter]
        a, b = (factor.detach().requires_grad_() for factor in (one.a, one.b))
        part = x.detach()[rows].requires_grad_()
        projection = Projection(weight=weight, bias=bias, a=a, b=b, scale=one.scale)
        dropout = Dropout(
            probability=one.dropout, seed=segment.seed, stream=segment.stream, row0=segment.row0
        )
        by_itself = lora_linear(part, projection, dropout=dropout, impl="cpu")
        by_itself.backward(grad[rows])  # type: ignore[no-untyped-call]
        assert torch.equal(output[rows], by_itself)
        assert x.grad is not None
        assert part.grad is not None
        assert torch.equal(x.grad[rows], part.grad)
        assert a.grad is not None
        assert b.grad is not None
        alone.setdefault(segment.adapter, []).append([a.grad, b.grad])
    for index, found in alone.items():
        for factor, parts in zip(
            (adapters[index].a, adapters[index].b), zip(*found, strict=True), strict=True
        ):
            assert factor.grad is not None
            assert torch.equal(factor.grad, sum(parts[1:], start=parts[0]))


def test_the_order_of_segments_does_not_change_their_rows(isa: Isa) -> None:
    x, weight, bias, *factors = (one.detach() for one in tensors(157))
    adapters = adapters_of(factors, DROPOUTS)
    output = grouped_lora_linear(x, weight, bias, adapters, SEGMENTS, impl="cpu")
    sizes = [one.num_rows for one in SEGMENTS]
    order = [4, 0, 5, 3, 1, 2]
    moved = torch.cat([x.split(sizes)[index] for index in order])  # type: ignore[no-untyped-call]
    shuffled = grouped_lora_linear(
        moved, weight, bias, adapters, [SEGMENTS[index] for index in order], impl="cpu"
    )
    assert torch.equal(shuffled, torch.cat([output.split(sizes)[index] for index in order]))  # type: ignore[no-untyped-call]


def test_cpu_bits_do_not_depend_on_threads(
    isa: Isa, gradients: Callable[..., list[Tensor]], same_for_threads: Callable[..., None]
) -> None:
    same_for_threads(lambda: gradients(runner(SEGMENTS, DROPOUTS), "cpu", tensors(157), torch.bfloat16))


def test_cpu_gives_row_major_gradients(isa: Isa) -> None:
    x, weight, bias, *factors = tensors(157)
    output = grouped_lora_linear(x, weight, bias, adapters_of(factors, DROPOUTS), SEGMENTS, impl="cpu")
    assert all(one.is_contiguous() for one in torch.autograd.grad(output.sum(), [x, *factors]))


def test_ops_pass_opcheck() -> None:
    x, weight, bias, *factors = tensors(9, ranks=[3, 2])
    joined = [*factors[::2], *factors[1::2]]
    numbers, segments, keys = [2.0, 0.5, 0.0, 0.25], [4, 1, 2, -1, 3, 0], [1, 2, 3] * 3
    torch.library.opcheck(grouped_lora_linear_op.op, (x, weight, bias, joined, numbers, segments, keys))
    frozen = [one.detach() for one in joined]
    saved = [x.detach(), weight, torch.randn(9, 3), torch.randn(sum(one.numel() for one in frozen))]
    arguments = (torch.randn(9, 70), saved, frozen, numbers, segments, keys, True)
    torch.library.opcheck(grouped_lora_linear_backward_op.op, arguments)


def test_auto_runs_and_trains_every_adapter() -> None:
    x, weight, bias, *factors = tensors(157)
    grouped_lora_linear(x, weight, bias, adapters_of(factors[:6], DROPOUTS[:3]), SEGMENTS).sum().backward()  # type: ignore[no-untyped-call]
    assert all(one.grad is not None and one.grad.any() for one in factors[:6])


def test_wrong_inputs_are_named() -> None:
    x, weight, bias, *factors = (one.detach() for one in tensors(20))
    adapters = adapters_of(factors, DROPOUTS)
    good = [Segment(num_rows=20, adapter=0)]
    with pytest.raises(ValueError, match=r"segments must hold the 20 rows of x, got \[19\]"):
        grouped_lora_linear(x, weight, bias, adapters, [Segment(num_rows=19, adapter=0)])
    with pytest.raises(ValueError, match=r"segments\[0\]\.adapter must be in -1\.\.3, got 4"):
        grouped_lora_linear(x, weight, bias, adapters, [replace(good[0], adapter=4)])
    with pytest.raises(ValueError, match=r"adapters\[0\] must have a \[R, 65\] and b \[70, R\]"):
        grouped_lora_linear(x, weight, bias, [replace(adapters[0], b=adapters[1].b)], good)
    with pytest.raises(ValueError, match=r"adapters\[0\]\.dropout must be in \[0, 1\), got 1\.0"):
        grouped_lora_linear(x, weight, bias, [replace(adapters[0], dropout=1.0)], good)
    with pytest.raises(ValueError, match="adapters must hold at least one adapter"):
        grouped_lora_linear(x, weight, bias, [], good)
    with pytest.raises(ValueError, match="needs frozen weight and bias"):
        grouped_lora_linear(x, weight.requires_grad_(), bias, adapters, good, impl="cpu")
