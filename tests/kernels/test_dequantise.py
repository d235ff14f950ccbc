"""Frozen weights of 8 and 4 bits: the numbers that they stand for, and products with them against float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchao.quantization import Int8Tensor, PerRow, to_nf4

from luthier.kernels import products
from luthier.kernels.dequantise import dense, dequantise, is_quantised
from luthier.kernels.dispatch import Isa
from luthier.kernels.grouped_lora_linear import LoraAdapter, Segment, grouped_lora_linear
from luthier.kernels.linear import linear
from luthier.kernels.lora_linear import Dropout, Projection, lora_linear_multi

FORMATS = ("int8", "nf4")
K = 96


def held(name: str, *shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    """A weight as torchao quantises it."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(*shape, generator=generator).mul(0.1).to(dtype)
    found: Tensor = Int8Tensor.from_hp(weight, PerRow()) if name == "int8" else to_nf4(weight, 64, 4)
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(8, 32), (64, 96), (256, 128)])
@pytest.mark.parametrize("name", FORMATS)
def test_cpu_gives_the_very_numbers_that_torchao_gives(
    isa: Isa, name: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = held(name, *shape, dtype=dtype)
    found = dequantise(weight, impl="cpu")
    assert (found.dtype, found.shape) == (dtype, weight.shape)
    assert torch.equal(found, dequantise(weight, impl="eager"))
    assert type(found) is Tensor


@pytest.mark.parametrize("name", FORMATS)
def test_cpu_bits_do_not_depend_on_threads(
    isa: Isa, name: str, same_for_threads: Callable[..., None]
) -> None:
    weight = held(name, 256, 256)
    same_for_threads(lambda: [dequantise(weight, impl="cpu")])


@pytest.mark.parametrize("rows", [1, 5, 16, 70, 300, 900])
@pytest.mark.parametrize("shape", [(256, 33), (132, 64), (96, 2304), (36, 4160)], ids=str)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_made_within_a_product_is_what_is_made_before_it(
    isa: Isa, name: str, shape: tuple[int, int], rows: int, dtype: torch.dtype
) -> None:
    """Panels cut rows and blocks anywhere, long rows are made in parts, and rows are many enough to be packed once."""
    weight = held(name, *shape, dtype=dtype)
    numbers = dequantise(weight, impl="eager")
    generator = torch.Generator().manual_seed(rows)
    x, grad = (torch.randn(rows, size, generator=generator).to(dtype) for size in shape[::-1])
    for given, is_transposed, size in ((x, True, shape[0]), (grad, False, shape[1])):
        outs = [
            products.product([(given, one, is_transposed)], torch.empty(rows, size, dtype=dtype))
            for one in (weight, numbers)
        ]
        assert torch.equal(*outs)


@pytest.mark.parametrize("name", FORMATS)
def test_products_with_codes_do_not_depend_on_threads_or_other_rows(
    isa: Isa, name: str, same_for_threads: Callable[..., None]
) -> None:
    weight, x = held(name, 160, 192), torch.randn(70, 192).to(torch.bfloat16)
    same_for_threads(lambda: [linear(x, weight, impl="cpu")])
    alone = torch.cat([linear(x[row : row + 1], weight, impl="cpu") for row in range(len(x))])
    assert torch.equal(alone, linear(x, weight, impl="cpu"))


def test_what_is_not_quantised_stays_as_it_is() -> None:
    plain = torch.ones(4, 4)
    assert dense(plain) is plain
    assert not is_quantised(torch.nn.Parameter(plain))
    assert is_quantised(torch.nn.Parameter(held("nf4", 8, 32), requires_grad=False))
    with pytest.raises(ValueError, match="weight must be one of torchao's Int8Tensor, NF4Tensor, got Tensor"):
        dequantise(plain)
    with pytest.raises(ValueError, match=r"impl 'triton' needs NF4 in blocks of 64.* got blocks of 32"):
        dequantise(to_nf4(torch.ones(4, 32), 32, 4), impl="triton")
    with pytest.raises(ValueError, match=r"impl 'cpu' needs bfloat16 or float32, got torch\.float16"):
        dequantise(held("int8", 4, 32, dtype=torch.float16), impl="cpu")


Product = Callable[[str, Sequence[Tensor], Sequence[Tensor]], list[Tensor]]
"""(impl, weights, x and what is learnt) -> outputs."""


def _linear(impl: Any, weights: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    return [linear(tensors[0], weights[0], impl=impl)]


def _projections(weights: Sequence[Tensor], factors: Sequence[Tensor]) -> list[Projection]:
    return [
        Projection(weight=weight, a=factors[2 * place], b=factors[2 * place + 1], scale=2.0)
        for place, weight in enumerate(weights)
    ]


def _lora(impl: Any, weights: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    return lora_linear_multi(tensors[0], _projections(weights, tensors[1:]), impl=impl)


def _dropped(impl: Any, weights: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    dropout = Dropout(probability=0.3, seed=5)
    return lora_linear_multi(tensors[0], _projections(weights, tensors[1:]), dropout=dropout, impl=impl)


def _grouped(impl: Any, weights: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    rows = tensors[0].shape[0]
    segments = [
        Segment(num_rows=5, adapter=0),
        Segment(num_rows=rows - 9, adapter=-1),
        Segment(num_rows=4, adapter=0),
    ]
    adapter = LoraAdapter(a=tensors[1], b=tensors[2], scale=2.0)
    return [grouped_lora_linear(tensors[0], weights[0], None, [adapter], segments, impl=impl)]


PRODUCTS = {"linear": _linear, "lora_linear": _lora, "dropout": _dropped, "grouped_lora_linear": _grouped}


def learnt(rows: int = 40) -> list[Tensor]:
    """X, and the factors of two projections, as tensors that learn."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(rows, K), (8, K), (64, 8), (8, K), (32, 8)]
    return [torch.randn(*shape, generator=generator).mul(0.5).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_are_as_exact_as_with_the_numbers_themselves(
    isa: Isa, name: str, product: str, dtype: torch.dtype, exact_as_eager: Callable[..., None]
) -> None:
    weights = [held(name, 64, K, dtype=dtype), held(name, 32, K, dtype=dtype, seed=3)]

    def run(impl: str, *tensors: Tensor) -> list[Tensor]:
        """In float64 with the numbers that the weights stand for, else with the weights."""
        of_type = tensors[0].dtype == dtype
        given = weights if of_type else [dense(one).to(tensors[0].dtype) for one in weights]
        return PRODUCTS[product](impl, given, tensors)

    count = {"linear": 1, "grouped_lora_linear": 3}.get(product, 5)
    exact_as_eager(run, learnt()[:count], dtype)


@pytest.mark.parametrize("impl", ["cpu", "eager"])
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("name", FORMATS)
def test_outputs_and_gradients_have_the_bits_of_the_numbers_themselves(
    name: str, product: str, impl: str
) -> None:
    weights = [held(name, 64, K), held(name, 32, K, seed=3)]
    found = []
    for given in (weights, [dense(one) for one in weights]):
        tensors = [one.detach().requires_grad_() for one in learnt()]
        tensors[0] = tensors[0].detach().bfloat16().requires_grad_()
        outputs = PRODUCTS[product](impl, given, tensors)
        torch.autograd.backward(outputs, [torch.ones_like(one) for one in outputs])
        found.append([*outputs, *(one.grad for one in tensors if one.grad is not None)])
    assert len(found[0]) == len(found[1]) > 1
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("impl", ["cpu", "eager"])
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("name", FORMATS)
def test_no_product_keeps_a_weight_in_bfloat16_for_its_gradient(name: str, product: str, impl: str) -> None:
    weights = [held(name, 64, K), held(name, 32, K, seed=3)]
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    tensors = [one.bfloat16() if place == 0 else one for place, one in enumerate(learnt(rows=41))]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        PRODUCTS[product](impl, weights, tensors)
    sizes = {one.numel() for one in kept if not is_quantised(one)}
    assert sizes.isdisjoint({64 * K, 32 * K}), "of the weights' sizes"
    assert product == "linear" or sizes, "the factors are kept"


class _Seen(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch gives it no types
    """Notes the operators that are called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(self, op: Any, types: Any, inputs: Any = (), options: Any = None) -> Any:
        self.names.add(op.name())
        return op(*inputs, **(options or {}))


@pytest.mark.parametrize("product", ["linear", "lora_linear"])
@pytest.mark.parametrize("name", FORMATS)
def test_who_watches_sees_the_operator_and_the_same_bits(name: str, product: str) -> None:
    """As selective checkpointing does, which keeps what an operator gave."""
    weights = [held(name, 64, K), held(name, 32, K, seed=3)]
    tensors = [one.bfloat16() if place == 0 else one for place, one in enumerate(learnt())]
    plain = PRODUCTS[product]("cpu", weights, tensors)
    seen = _Seen()
    with seen:
        watched = PRODUCTS[product]("cpu", weights, tensors)
    assert f"luthier::{product}" in seen.names
    assert all(torch.equal(one, other) for one, other in zip(plain, watched, strict=True))
