"""Triton's kernels that read codes: torchao's very numbers, products with them against float64, and who takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torchao.quantization import Int8Tensor, PerRow, to_nf4

from luthier.kernels import tables
from luthier.kernels.dequantise import dense, dequantise
from luthier.kernels.linear import linear, packed_shape_class, reads_codes, shape_class
from luthier.kernels.lora_linear import Dropout, Projection, lora_linear_multi

pytest.importorskip("triton")
FORMATS = ("int8", "nf4")


@pytest.fixture
def half(triton_kernels: str, device: str) -> torch.dtype:
    """The type that weights stand for: bfloat16, in whose place the interpreter takes float16."""
    return torch.bfloat16 if device == "cuda" else torch.float16


@pytest.fixture
def forced() -> Iterator[None]:
    yield
    tables.force_impl("auto")


@pytest.fixture
def of_codes(
    triton_kernels: str, forced: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[tuple[int, ...]]]:
    """The shapes of weights whose codes a LoRA layer's product read: on a GPU too, whose table names nothing yet.

    Its kernels ask the table of `linear` what the bases are; only the interpreter takes codes without.
    """
    from luthier.kernels.dequantise.triton import packed_product
    from luthier.kernels.lora_linear import triton

    found: list[tuple[int, ...]] = []

    def counted(x: Tensor, weight: Tensor, *more: Any) -> Tensor:
        found.append(tuple(weight.shape))
        return packed_product(x, weight, *more)

    monkeypatch.setattr(triton, "packed_product", counted)
    tables.force_impl("triton")
    yield found
    assert found, "no product read codes"


def held(name: str, *shape: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Tensor:
    """A weight as torchao quantises it."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(*shape, generator=generator).mul(0.1).to(dtype)
    together = min(64, weight.numel() // 64 & -(weight.numel() // 64))
    found: Tensor = Int8Tensor.from_hp(weight, PerRow()) if name == "int8" else to_nf4(weight, 64, together)
    return found.to(device)


@pytest.mark.parametrize("shape", [(8, 32), (64, 96), (70, 128), (192, 64)], ids=str)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("wide", [False, True])
def test_the_numbers_are_torchaos(
    triton_kernels: str, half: torch.dtype, device: str, name: str, shape: tuple[int, int], wide: bool
) -> None:
    weight = held(name, *shape, dtype=torch.float32 if wide else half, device=device)
    found = dequantise(weight, impl="triton")
    assert (found.dtype, found.shape) == (weight.dtype, weight.shape)
    assert torch.equal(found, dequantise(weight, impl="eager"))
    assert type(found) is Tensor


def test_rows_of_int8_end_anywhere(triton_kernels: str, half: torch.dtype, device: str) -> None:
    weight = held("int8", 33, 70, dtype=half, device=device)
    assert torch.equal(dequantise(weight, impl="triton"), dequantise(weight, impl="eager"))


@pytest.mark.parametrize("name", FORMATS)
def test_products_are_of_the_very_numbers(
    triton_kernels: str, half: torch.dtype, device: str, name: str
) -> None:
    """Of rows with a single 1 a product is the weight itself, there and back, by one slice and by several."""
    weight = held(name, 128, 192, dtype=half, device=device)
    numbers = dequantise(weight, impl="eager")
    for rows in (slice(0, 5), slice(0, 192)):
        x = torch.eye(192, dtype=half, device=device)[rows].requires_grad_()
        assert torch.equal(linear(x, weight, impl="triton"), numbers.T[rows])
    for count in (5, 128):
        x = torch.zeros(count, 192, dtype=half, device=device, requires_grad=True)
        (found,) = torch.autograd.grad(
            linear(x, weight, impl="triton"), x, torch.eye(128, dtype=half, device=device)[:count]
        )
        assert torch.equal(found, numbers[:count])


def learnt(rows: int, inputs: int, outputs: tuple[int, ...], rank: int) -> list[Tensor]:
    """X, a bias of the first projection, and the factors of all."""
    generator = torch.Generator().manual_seed(rows)
    shapes = [(rows, inputs), (outputs[0],)]
    shapes += [shape for size in outputs for shape in ((rank, inputs), (size, rank))]
    return [torch.randn(*shape, generator=generator).mul(0.5).requires_grad_() for shape in shapes]


def running(
    name: str, inputs: int, outputs: tuple[int, ...], dtype: torch.dtype, dropout: Dropout | None = None
) -> Callable[..., list[Tensor]]:
    """(impl, *learnt) -> a plain product, and those with updates; in float64 with the numbers of the weights."""

    def run(impl: Any, x: Tensor, bias: Tensor, *factors: Tensor) -> list[Tensor]:
        weights = [
            held(name, size, inputs, dtype=dtype, seed=place).to(x.device)
            for place, size in enumerate(outputs)
        ]
        if x.dtype != dtype:
            weights = [dequantise(one, impl="eager").to(x.dtype) for one in weights]
        projections = [
            Projection(
                weight=weight,
                a=factors[2 * place],
                b=factors[2 * place + 1],
                scale=2.0,
                bias=None if place else bias,
            )
            for place, weight in enumerate(weights)
        ]
        alone = linear(x, weights[0], bias, impl=impl)
        return [alone, *lora_linear_multi(x, projections, dropout=dropout, impl=impl)]

    return run


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "rank"),
    [
        (0, 64, (16,), 8),
        (1, 64, (16,), 8),
        (5, 576, (96, 40), 16),  # few rows by several slices, of which the last is shorter
        (17, 128, (72, 40, 24), 70),
        (64, 64, (130,), 4),
        (70, 192, (200, 65), 16),  # many rows, whose tiles end within one another
    ],
    ids=str,
)
@pytest.mark.parametrize("name", FORMATS)
def test_products_are_as_exact_as_with_the_numbers_themselves(
    of_codes: list[tuple[int, ...]],
    half: torch.dtype,
    name: str,
    rows: int,
    inputs: int,
    outputs: tuple[int, ...],
    rank: int,
    exact_as_eager: Callable[..., None],
) -> None:
    run = running(name, inputs, outputs, half)
    exact_as_eager(run, learnt(rows, inputs, outputs, rank), half)
    assert of_codes == [(size, inputs) for size in outputs]


@pytest.mark.parametrize(("name", "inputs"), [("int8", 70), ("nf4", 64)])
@pytest.mark.parametrize("drops", [False, True])
def test_rows_of_any_length_and_dropout_too(
    of_codes: list[tuple[int, ...]],
    half: torch.dtype,
    name: str,
    inputs: int,
    drops: bool,
    exact_as_eager: Callable[..., None],
) -> None:
    """With dropout the input's gradient is taken with numbers, since its mask stands before the base's product."""
    run = running(name, inputs, (48, 33), half, Dropout(probability=0.3, seed=5) if drops else None)
    exact_as_eager(run, learnt(9, inputs, (48, 33), 8), half)
    assert of_codes == [(48, inputs), (33, inputs)]


@pytest.mark.parametrize("name", FORMATS)
def test_float32_is_multiplied_without_rounding(
    of_codes: list[tuple[int, ...]], name: str, exact_as_eager: Callable[..., None]
) -> None:
    run = running(name, 128, (40,), torch.float32)
    exact_as_eager(run, learnt(9, 128, (40,), 8), torch.float32)


@pytest.mark.parametrize("name", FORMATS)
def test_the_weight_is_never_made_as_a_whole(
    of_codes: list[tuple[int, ...]],
    half: torch.dtype,
    device: str,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from luthier.kernels import direct
    from luthier.kernels.lora_linear import triton

    def refuse(weight: Tensor) -> Tensor:
        raise AssertionError(f"{type(weight).__name__} was made into numbers")

    for module in (direct, triton):
        monkeypatch.setattr(module, "dense", refuse)
    tensors = [one.detach().to(device, half).requires_grad_() for one in learnt(5, 64, (32, 16), 4)]
    outputs = running(name, 64, (32, 16), half)("triton", *tensors)
    torch.autograd.backward(outputs, [torch.ones_like(one) for one in outputs])
    assert all(one.grad is not None for one in tensors)
    assert of_codes == [(32, 64), (16, 64)]


def test_rows_that_end_within_a_block_of_nf4_are_refused_or_made_before(
    triton_kernels: str, half: torch.dtype, device: str, exact_as_eager: Callable[..., None]
) -> None:
    weight, x = held("nf4", 64, 96, dtype=half, device=device), torch.ones(3, 96, dtype=half, device=device)
    words = (
        r"needs NF4 in blocks of 64, whole ones in each row of a product, got blocks of 64 in .*\(64, 96\)"
    )
    with pytest.raises(ValueError, match=words):
        linear(x, weight, impl="triton")
    assert torch.equal(linear(x, weight), linear(x, weight, impl="eager"))

    def run(impl: Any, x: Tensor, a: Tensor, b: Tensor) -> list[Tensor]:
        given = weight.cpu() if x.device.type == "cpu" else weight
        given = given if x.dtype == half else dequantise(given, impl="eager").to(x.dtype)
        return lora_linear_multi(x, [Projection(weight=given, a=a, b=b, scale=2.0)], impl=impl)

    x, _, a, b = learnt(9, 96, (64,), 8)
    exact_as_eager(run, [x, a, b], half)


def test_a_weight_that_is_not_quantised_has_no_kernel_of_ours() -> None:
    x = torch.ones(3, 64)
    with pytest.raises(ValueError, match="impl 'triton' is not there for linear"):
        linear(x, torch.ones(4, 64), impl="triton")


def test_few_rows_are_cut_alike_however_few_they_are(triton_kernels: str) -> None:
    from luthier.kernels.dequantise.triton import _slice

    assert {_slice(rows, 4096, 16, 64) for rows in (1, 16, 17, 64)} == {512}
    assert _slice(65, 4096, 16, 64) == 4096
    assert _slice(1, 4096, 128, 64) == 4096
    assert _slice(1, 576, 1, 64) == 128, "of at most eight slices each whole tiles"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", FORMATS)
def test_on_a_gpu_a_row_has_the_same_bits_beside_few_others(name: str) -> None:
    """Slices are the same, and so are the sums within one where tiles of other heights are multiplied alike."""
    weight = held(name, 256, 4096, dtype=torch.bfloat16, device="cuda")
    x = torch.randn(64, 4096, generator=torch.Generator().manual_seed(1)).to("cuda", torch.bfloat16)
    alone, *others = (linear(x[:rows], weight, impl="triton")[0] for rows in (1, 17, 64))
    assert all(torch.equal(alone, one) for one in others)


def on_gpu(rows: int) -> Any:
    """What the choice looks at, of rows on a GPU."""
    shape = torch.Size([rows, 64])
    return SimpleNamespace(
        device=torch.device("cuda", 0),
        dtype=torch.bfloat16,
        shape=shape,
        numel=lambda: rows * 64,
        requires_grad=True,
    )


@pytest.mark.parametrize("name", FORMATS)
def test_codes_are_read_where_the_table_of_linear_says_so_and_only_there(
    name: str, monkeypatch: pytest.MonkeyPatch, forced: None, caplog: pytest.LogCaptureFixture
) -> None:
    from luthier.kernels import gpu

    weight = held(name, 16, 64, dtype=torch.bfloat16)
    monkeypatch.setattr(gpu, "interpreted", lambda: False)
    monkeypatch.setattr(gpu, "architecture", lambda device: "sm_90")
    measured = {f"sm_90/bfloat16/few_rows-{name}": "triton", f"sm_90/bfloat16/some_rows-{name}": "eager"}
    monkeypatch.setattr(tables, "entries", lambda op: measured if op == "linear" else {})
    tables.choose.cache_clear()
    try:
        assert [reads_codes(on_gpu(rows), weight) for rows in (1, 64, 65, 1023, 1024)] == [
            True,
            True,
            False,
            False,
            False,
        ]
        assert not caplog.records, "a LoRA layer has a table of its own: many rows were not measured here"
        assert not reads_codes(torch.ones(1, 64, dtype=torch.bfloat16), weight), "on a processor"
        tables.force_impl("eager")
        assert not reads_codes(on_gpu(1), weight)
        tables.force_impl("triton")
        assert reads_codes(on_gpu(2000), weight)
    finally:
        tables.choose.cache_clear()


def test_a_weight_is_looked_at_only_where_the_table_would_read_its_codes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each projection of each layer asks, there and back; the weight takes several times as long as the table."""
    from luthier.kernels import gpu
    from luthier.kernels import linear as linear_package

    looked: list[int] = []
    weight = held("nf4", 16, 64, dtype=torch.bfloat16)
    table = {"sm_90/bfloat16/few_rows-nf4": "triton"}
    monkeypatch.setattr(gpu, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(tables, "entries", lambda op: table)
    monkeypatch.setattr(linear_package, "_refusal", lambda impl, x, weight: looked.append(x.shape[0]))
    assert [reads_codes(on_gpu(rows), weight) for rows in (64, 65, 2000)] == [True, False, False]
    assert looked == [64]
    monkeypatch.setattr(linear_package, "_refusal", lambda impl, x, weight: "blocks of 32")
    assert not reads_codes(on_gpu(64), weight)


def test_nothing_was_measured_yet() -> None:
    """No GPU has run these kernels: everywhere numbers are made before a product until `gpu_tables.py` says more."""
    for op in ("linear", "dequantise"):
        assert not [key for key in tables.entries(op) if key.startswith(("sm_", "gfx"))]


def test_a_lora_layer_takes_them_though_its_own_table_has_eager(
    monkeypatch: pytest.MonkeyPatch, forced: None
) -> None:
    from luthier.kernels import linear as linear_package
    from luthier.kernels import lora_linear

    weights = [held("nf4", 16, 64, dtype=torch.bfloat16), torch.ones(16, 64, dtype=torch.bfloat16)]
    factors = torch.ones(4, 64), torch.ones(16, 4)
    projections = [Projection(weight=one, a=factors[0], b=factors[1], scale=1.0) for one in weights]
    monkeypatch.setattr(linear_package, "reads_codes", lambda x, weight: x.shape[0] < 64)
    taken = [lora_linear._reads_codes(on_gpu(rows), projections[:1]) for rows in (63, 64)]
    assert taken == [True, False]
    assert not lora_linear._reads_codes(on_gpu(1), projections), "one weight is no codes"
    with torch.autocast("cpu", torch.bfloat16):
        assert not lora_linear._reads_codes(on_gpu(1), projections[:1]), "it would be given numbers"
    tables.force_impl("eager")
    assert not lora_linear._reads_codes(on_gpu(1), projections[:1])


def test_a_class_on_a_gpu_names_the_format_and_on_a_processor_does_not() -> None:
    weight = held("nf4", 16, 64, dtype=torch.bfloat16)
    assert [packed_shape_class(rows, "int8") for rows in (64, 65, 1024)] == [
        "few_rows-int8",
        "some_rows-int8",
        "many_rows-int8",
    ]
    assert shape_class(3, on_gpu(3), weight) == "few_rows-nf4"
    assert shape_class(3, torch.ones(3, 64, dtype=torch.bfloat16), weight) == "one_rows-no_gradient"
    assert dense(weight).shape == weight.shape
