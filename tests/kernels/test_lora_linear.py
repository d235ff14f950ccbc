"""Linear layers with low-rank updates: outputs and gradients against float64, on every instruction set."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from luthier.kernels.dispatch import Isa
from luthier.kernels.lora_linear import (
    Dropout,
    Projection,
    lora_linear,
    lora_linear_multi,
    token_number,
)
from luthier.kernels.lora_linear.cpu import lora_linear_backward_op, lora_linear_op
from luthier.kernels.lora_linear.reference import dropout_mask
from luthier.kernels.tables import Impl

DROPOUT = Dropout(probability=0.3, seed=12345678901, stream=3, row0=2**33)


def tensors(rows: int, inputs: int, widths: list[int], ranks: list[int]) -> list[Tensor]:
    """x, then weight, bias, A, B and LoRA bias of each projection; weights are frozen."""
    generator = torch.Generator().manual_seed(rows + inputs)

    def random(*shape: int, learnt: bool = True) -> Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_(learnt)

    made = [random(rows, inputs)]
    for width, rank in zip(widths, ranks, strict=True):
        made += [random(width, inputs, learnt=False), random(width), random(rank, inputs)]
        made += [random(width, rank), random(width)]
    return made


def runner(dropout: Dropout | None = None) -> Callable[..., list[Tensor]]:
    def run(impl: Any, x: Tensor, *rest: Tensor) -> list[Tensor]:
        parts = [rest[start : start + 5] for start in range(0, len(rest), 5)]
        projections = [
            Projection(weight=weight, bias=bias, a=a, b=b, lora_bias=lora_bias, scale=0.5 + index)
            for index, (weight, bias, a, b, lora_bias) in enumerate(parts)
        ]
        return lora_linear_multi(x, projections, dropout=dropout, impl=impl)

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [None, DROPOUT])
@pytest.mark.parametrize(
    ("rows", "inputs", "widths", "ranks"),
    [
        (0, 8, [4], [2]),
        (1, 64, [65], [1]),
        (7, 33, [16, 5], [4, 8]),
        (129, 577, [200, 33, 64], [16, 33, 64]),
        (40, 40, [24], [256]),
    ],
)
def test_kernels_are_no_less_exact_than_eager(
    kernels: str,
    dtype: torch.dtype,
    dropout: Dropout | None,
    rows: int,
    inputs: int,
    widths: list[int],
    ranks: list[int],
    exact_as_eager: Callable[..., None],
    *,
    interpreted: bool,
) -> None:
    # Two tiles of 64 and a part of one: no kernel of Triton's does another thing with more.
    inputs = min(inputs, 161) if interpreted else inputs
    exact_as_eager(runner(dropout), tensors(rows, inputs, widths, ranks), dtype)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dropout", [None, DROPOUT])
@pytest.mark.parametrize(
    "shape",
    [
        (130, 64, [72], [4]),
        (257, 136, [264, 16, 8], [16, 8, 33]),
        (40, 72, [24, 40], [70, 130]),
        (65, 33, [40], [8]),  # no tensor descriptor takes rows of 33
    ],
)
def test_products_with_frozen_weights_are_ours_or_the_librarys(
    triton_kernels: str,
    fused: bool,
    dropout: Dropout | None,
    shape: tuple[int, int, list[int], list[int]],
    exact_as_eager: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from luthier.kernels.lora_linear import triton

    monkeypatch.setattr(triton, "_is_fused", lambda *_: fused)
    exact_as_eager(runner(dropout), tensors(*shape), torch.bfloat16)


def test_ours_is_taken_where_a_measurement_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("luthier.kernels.lora_linear.triton")
    monkeypatch.setattr(triton, "interpreted", lambda: False)
    x = torch.empty(1, dtype=torch.bfloat16)
    table = {"sm_90": triton.Fused(least=1000, most_inner=50)}
    for chip, taken in (("sm_90", [True, False, False]), ("sm_80", [False] * 3)):
        monkeypatch.setattr(triton, "architecture", lambda device, chip=chip: chip)
        asked = [(1000, 50), (999, 50), (1000, 51)]
        assert [triton._is_fused(table, x, products, inner) for products, inner in asked] == taken
        assert not any(
            triton._is_fused(table, x.to(other), 1000, 50) for other in (torch.float32, torch.float16)
        )


def test_rounded_factors_are_found_wherever_their_memory_begins() -> None:
    from luthier.kernels.lora_linear.factors import layout_of, rounded_parts, shapes_of

    factors = [torch.randn(shape) for shape in ((3, 5), (2, 5), (7, 3), (4, 2))]
    layout = layout_of(shapes_of(factors))
    memory = torch.full((layout.total + 9,), torch.nan)
    rounded = memory[9:]
    for factor, place, size in zip(factors, layout.places, layout.sizes, strict=True):
        rounded[place : place + size] = factor.flatten()
    a, b = rounded_parts(rounded, factors)
    assert torch.equal(a, torch.cat(factors[:2]))
    assert all(map(torch.equal, b, factors[2:]))
    assert all(place % 8 == 0 for place in layout.places[2:])


def test_what_a_compiler_is_told_of_a_gpus_outputs_is_what_they_are() -> None:
    from luthier.kernels.lora_linear.factors import layout, layout_of, shapes_of

    with FakeTensorMode(), torch.device("cuda"):
        weights = [torch.empty(n, 16) for n in (6, 9)]
        factors = [torch.empty(shape) for shape in ((3, 16), (5, 16), (6, 3), (9, 5))]
        biases = [torch.empty(0)] * 2
        outputs = lora_linear_op.op(torch.empty(7, 16), weights, biases, factors, [1.0, 1.0, 0.0], [0, 0, 0])
        assert [tuple(one.shape) for one in outputs[:3]] == [(7, 6), (7, 9), (7, 8)]
        assert outputs[3].numel() == layout_of(shapes_of(factors)).total

    def rounded(a: Tensor, b: Tensor) -> Tensor:
        return a.new_empty(layout(shapes_of([a, b])).total)

    # Shapes that are symbols have no hash.
    traced = make_fx(rounded, tracing_mode="symbolic")(torch.empty(3, 5), torch.empty(7, 3))
    assert traced(torch.empty(4, 6), torch.empty(2, 4)).numel() == 24 + 8


def test_long_contractions_are_cut_and_summed(kernels: str, exact_as_eager: Callable[..., None]) -> None:
    exact_as_eager(runner(), tensors(5, 2200, [70], [3]), torch.bfloat16)
    exact_as_eager(runner(), tensors(5, 70, [2201], [3]), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_bits_depend_neither_on_threads_nor_on_other_rows(
    isa: Isa,
    dtype: torch.dtype,
    gradients: Callable[..., list[Tensor]],
    same_for_threads: Callable[..., None],
) -> None:
    inputs = tensors(200, 65, [70, 33], [16, 5])
    same_for_threads(lambda: gradients(runner(DROPOUT), "cpu", inputs, dtype))
    together = [output.detach() for output in runner(DROPOUT)("cpu", *(one.to(dtype) for one in inputs))]
    later = Dropout(probability=0.3, seed=DROPOUT.seed, stream=DROPOUT.stream, row0=DROPOUT.row0 + 50)
    part = runner(later)("cpu", inputs[0][50:73].to(dtype), *(one.to(dtype) for one in inputs[1:]))
    for whole, some in zip(together, part, strict=True):
        assert torch.equal(whole[50:73], some)


def test_dropout_keeps_what_the_reference_keeps(isa: Isa) -> None:
    x = torch.ones(37, 43)
    identity = Projection(weight=torch.zeros(43, 43), a=torch.eye(43), b=torch.eye(43), scale=1.0)
    kept = lora_linear(x, identity, dropout=DROPOUT, impl="cpu") != 0
    mask = dropout_mask((37, 43), DROPOUT.probability, DROPOUT.key, torch.device("cpu"))
    assert torch.equal(kept, mask)
    assert 0.65 < mask.double().mean() < 0.75


@pytest.mark.parametrize("impl", ["cpu", "eager"])
def test_a_token_is_dropped_alike_whatever_its_sequence_is_packed_with(impl: Impl) -> None:
    """Forward and backward: the mask goes by the numbers of sequence and token, not by the place in x."""
    lengths = {7: 5, 2**31 - 1: 3, 0: 9}
    projection = Projection(weight=torch.zeros(8, 8), a=torch.eye(8), b=torch.eye(8), scale=1.0)

    def kept(sequences: list[int]) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
        first, *later = sequences
        places = list(itertools.accumulate(lengths[one] for one in sequences))
        restarts = tuple((place, token_number(one)) for place, one in zip(places, later, strict=False))
        dropout = Dropout(probability=0.4, seed=11, stream=3, row0=token_number(first), restarts=restarts)
        x = torch.ones(places[-1], 8, requires_grad=True)
        out = lora_linear(x, projection, dropout=dropout, impl=impl)
        (gradient,) = torch.autograd.grad(out.sum(), x)
        assert torch.equal(gradient != 0, out != 0)
        parts = torch.split(out != 0, [lengths[one] for one in sequences])
        return dict(zip(sequences, parts, strict=True)), out

    alone = {sequence: kept([sequence])[0][sequence] for sequence in lengths}
    for order in itertools.permutations(lengths):
        packed, _ = kept(list(order))
        assert all(torch.equal(packed[sequence], alone[sequence]) for sequence in lengths)
    for sequence, length in lengths.items():
        key = (11, 3, token_number(sequence))
        assert torch.equal(alone[sequence], dropout_mask((length, 8), 0.4, key, torch.device("cpu")))
    assert not torch.equal(alone[7][:3], alone[2**31 - 1])


@pytest.mark.parametrize("restarts", [((0, 5),), ((3, 5), (3, 9)), ((4, 1), (2, 1))])
def test_restarts_of_dropout_that_do_not_rise_are_refused(restarts: tuple[tuple[int, int], ...]) -> None:
    projection = Projection(weight=torch.zeros(8, 8), a=torch.eye(8), b=torch.eye(8), scale=1.0)
    dropout = Dropout(probability=0.4, seed=11, restarts=restarts)
    with pytest.raises(ValueError, match="restarts must rise from above 0"):
        lora_linear(torch.ones(6, 8), projection, dropout=dropout)


def test_dropout_mask_is_philox() -> None:
    """Known answers of Random123's Philox4x32-10: the words decide by comparison with probability * 2^32."""
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]  # counter and key all zero
    for column, word in enumerate(words):
        below = dropout_mask((1, 4), word / 2**32, (0, 0, 0), torch.device("cpu"))
        above = dropout_mask((1, 4), (word + 1) / 2**32, (0, 0, 0), torch.device("cpu"))
        assert below[0, column]
        assert not above[0, column]


def test_dropout_mask_tells_seeds_streams_and_rows_apart() -> None:
    masks = [
        dropout_mask((1, 64), 0.5, key, torch.device("cpu"))
        for key in [(1, 0, 0), (2, 0, 0), (1 << 32, 0, 0), (1, 1, 0), (1, 0, 1), (1, 0, 1 << 32)]
    ]
    assert all(not torch.equal(one, other) for i, one in enumerate(masks) for other in masks[:i])


def test_cpu_takes_leading_dimensions_and_strided_views(isa: Isa) -> None:
    x, weight, _, a, b, _ = (one.detach() for one in tensors(24, 32, [10], [4]))
    projection = Projection(weight=weight, a=a, b=b, scale=2.0)
    want = lora_linear(x, projection, impl="cpu")
    assert torch.equal(lora_linear(x.view(2, 3, 4, 32), projection, impl="cpu").view(24, 10), want)
    askew = torch.full((24, 40), float("nan"))
    askew[:, 1:33] = x
    turned = Projection(weight=weight.T.contiguous().T, a=a.T.contiguous().T, b=b.T.contiguous().T, scale=2.0)
    assert torch.equal(lora_linear(askew[:, 1:33], turned, impl="cpu"), want)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_cpu_keeps_what_is_no_number_within_its_row(isa: Isa, value: float) -> None:
    x, weight, _, a, b, _ = (one.detach().bfloat16() for one in tensors(20, 33, [10], [4]))
    x[7, 32] = value
    output = lora_linear(x, Projection(weight=weight, a=a, b=b, scale=1.0), impl="cpu")
    assert not output[7].isfinite().any()
    assert output[[*range(7), *range(8, 20)]].isfinite().all()


def test_unused_outputs_have_no_gradient() -> None:
    x, *rest = tensors(9, 16, [8, 6], [2, 3])
    first, _ = runner()("cpu", x, *rest)
    first.sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert rest[8].grad is not None
    assert not rest[8].grad.any()


def test_frozen_input_gets_no_gradient() -> None:
    x, *rest = tensors(9, 16, [8], [2])
    x = x.detach()
    runner()("cpu", x, *rest)[0].sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is None
    assert rest[2].grad is not None


def test_cpu_gives_row_major_gradients(isa: Isa) -> None:
    inputs = tensors(9, 16, [8, 6], [2, 3])
    total = torch.cat(runner()("cpu", *inputs), dim=1).sum()
    found = torch.autograd.grad(total, [one for one in inputs if one.requires_grad])
    assert all(one.is_contiguous() for one in found)


def test_ops_pass_opcheck() -> None:
    x, weight, bias, a, b, _ = tensors(7, 16, [6], [3])
    for inputs in (x, x.detach().T.contiguous().T.requires_grad_()):
        torch.library.opcheck(lora_linear_op.op, (inputs, [weight], [bias], [a, b], [2.0, 0.25], [1, 2, 3]))
    saved = [x.detach(), torch.randn(7, 3), torch.empty(0)]
    arguments = (
        [torch.randn(7, 6)],
        saved,
        [weight],
        [a.detach(), b.detach()],
        [2.0, 0.0],
        [0, 0, 0],
        [True, True],
    )
    torch.library.opcheck(lora_linear_backward_op.op, arguments)


@pytest.mark.parametrize("dropout", [None, DROPOUT])
def test_reference_gradient_is_its_derivative(dropout: Dropout | None) -> None:
    inputs = [one.detach().double().requires_grad_() for one in tensors(5, 6, [4, 3], [2, 1])]
    assert torch.autograd.gradcheck(lambda *given: tuple(runner(dropout)("eager", *given)), inputs)


def test_autocast_computes_in_bfloat16() -> None:
    x, weight, _, a, b, _ = tensors(7, 16, [6], [3])
    with torch.autocast("cpu", torch.bfloat16):
        output = lora_linear(x, Projection(weight=weight, a=a, b=b, scale=1.0), impl="cpu")
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()  # type: ignore[no-untyped-call]
    assert a.grad is not None
    assert a.grad.dtype == torch.float32


def test_auto_trains_the_weight_through_eager() -> None:
    x, weight, _, a, b, _ = tensors(7, 16, [6], [3])
    projection = Projection(weight=weight.requires_grad_(), a=a, b=b, scale=1.0)
    lora_linear(x, projection).sum().backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    with pytest.raises(ValueError, match="frozen"):
        lora_linear(x, projection, impl="cpu")


def test_lora_linear_refuses_wrong_inputs() -> None:
    x, weight, bias, a, b, _ = (one.detach() for one in tensors(7, 16, [6], [3]))
    good = Projection(weight=weight, a=a, b=b, scale=1.0)
    with pytest.raises(ValueError, match="got none"):
        lora_linear_multi(x, [])
    with pytest.raises(ValueError, match=r"\(7, 15\)"):
        lora_linear(x[:, 1:], good)
    with pytest.raises(ValueError, match=r"\(6, 2\)"):
        lora_linear(x, Projection(weight=weight, a=a, b=b[:, 1:], scale=1.0))
    with pytest.raises(ValueError, match=r"bias must have shape \(6,\), got \(5,\)"):
        lora_linear(x, Projection(weight=weight, a=a, b=b, scale=1.0, bias=bias[1:]))
    with pytest.raises(ValueError, match="bfloat16"):
        lora_linear(x.bfloat16(), good)
    doubled = Projection(weight=weight.double(), a=a, b=b, scale=1.0)
    with pytest.raises(ValueError, match="float64"):
        lora_linear(x.double(), doubled, impl="cpu")
    with pytest.raises(ValueError, match=r"\[0, 1\), got 1"):
        lora_linear(x, good, dropout=Dropout(probability=1.0, seed=0))
    with pytest.raises(ValueError, match="fast"):
        lora_linear(x, good, impl="fast")  # type: ignore[arg-type]
