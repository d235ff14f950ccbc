"""Linear layers without an update: output and gradients against float64, on every instruction set of this machine."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from luthier.kernels.dispatch import Isa
from luthier.kernels.linear import linear, shape_class, wide_linear, wide_shape_class
from luthier.kernels.linear.cpu import linear_op, wide_linear_op
from luthier.kernels.linear.reference import linear_reference, wide_linear_reference


def inputs(rows: tuple[int, ...], outputs: int, width: int, *, learnt: bool = True) -> list[Tensor]:
    generator = torch.Generator().manual_seed(width)
    return [
        torch.randn(*rows, width, generator=generator).requires_grad_(),
        torch.randn(outputs, width, generator=generator).requires_grad_(learnt),
        torch.randn(outputs, generator=generator).requires_grad_(learnt),
    ]


def run(impl: str, x: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    return [linear(x, weight, bias, impl=impl), linear(x, weight, impl=impl)]  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("learnt", [True, False])
@pytest.mark.parametrize(
    ("rows", "outputs", "width"),
    [((0,), 5, 3), ((1,), 1, 1), ((7,), 33, 70), ((2, 3), 65, 16), ((130,), 48, 96)],
)
def test_kernels_are_no_less_exact_than_eager(
    isa: Isa,
    dtype: torch.dtype,
    learnt: bool,
    rows: tuple[int, ...],
    outputs: int,
    width: int,
    exact_as_eager: Callable[..., None],
) -> None:
    exact_as_eager(run, inputs(rows, outputs, width, learnt=learnt), dtype)


def test_cpu_bits_depend_neither_on_threads_nor_on_other_rows(
    isa: Isa, gradients: Callable[..., list[Tensor]], same_for_threads: Callable[..., None]
) -> None:
    given = inputs((100,), 33, 40)
    same_for_threads(lambda: gradients(run, "cpu", given, torch.bfloat16))
    x, weight, bias = (one.detach().bfloat16() for one in given)
    whole = linear(x, weight, bias, impl="cpu")
    assert torch.equal(
        torch.cat([linear(x[row : row + 1], weight, bias, impl="cpu") for row in range(100)]), whole
    )


def test_cpu_takes_strided_rows_and_a_turned_weight(isa: Isa) -> None:
    x, weight, _ = (one.detach() for one in inputs((20,), 33, 24))
    wide = torch.full((20, 40), float("nan"))
    wide[:, 3:27] = x
    turned = weight.T.contiguous().T
    assert torch.equal(linear(wide[:, 3:27], turned, impl="cpu"), linear(x, weight, impl="cpu"))


@pytest.mark.parametrize(
    ("rows", "outputs", "width"), [((0,), 5, 3), ((1,), 1, 1), ((2, 3), 65, 16), ((70,), 300, 520)]
)
def test_wide_products_are_not_rounded_to_the_type_of_what_is_multiplied(
    isa: Isa, rows: tuple[int, ...], outputs: int, width: int
) -> None:
    x, weight, _ = (one.detach().bfloat16() for one in inputs(rows, outputs, width))
    exact = x.double() @ weight.double().T
    for impl in ("cpu", "eager", "auto"):
        found = wide_linear(x, weight, impl=impl)
        assert found.dtype == torch.float32
        assert found.shape == exact.shape
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5 * width**0.5)
    assert torch.equal(wide_linear(x, weight, impl="cpu").bfloat16(), linear(x, weight, impl="cpu"))


def test_wide_bits_depend_neither_on_threads_nor_on_other_rows(
    isa: Isa, same_for_threads: Callable[..., None]
) -> None:
    x, weight, _ = (one.detach().bfloat16() for one in inputs((70,), 300, 520))
    same_for_threads(lambda: [wide_linear(x, weight, impl="cpu")])
    whole = wide_linear(x, weight, impl="cpu")
    alone = [wide_linear(x[row : row + 1], weight, impl="cpu") for row in range(70)]
    assert torch.equal(torch.cat(alone), whole)


def test_bits_of_many_rows_are_those_of_fewer(isa: Isa) -> None:
    # Panels are packed once for many rows, and rows go by tiles of 16 and 32 where there are tiles.
    x, weight, _ = (one.detach().bfloat16() for one in inputs((300,), 70, 2100))
    whole = wide_linear(x, weight, impl="cpu")
    torch.testing.assert_close(whole.double(), x.double() @ weight.double().T, rtol=1e-5, atol=1e-3)
    for first, last in ((0, 15), (3, 19), (7, 39), (20, 276), (40, 300)):
        assert torch.equal(wide_linear(x[first:last], weight, impl="cpu"), whole[first:last])


def test_wide_products_of_other_types_are_those_of_linear() -> None:
    x, weight, _ = (one.detach() for one in inputs((7,), 33, 16))
    assert torch.equal(wide_linear(x, weight), linear(x, weight))
    assert wide_linear(x.double(), weight.double()).dtype == torch.float32
    parts = wide_linear_reference(x.bfloat16(), weight.bfloat16())
    assert torch.equal(parts, x.bfloat16().float() @ weight.bfloat16().float().T)
    assert [wide_shape_class(rows) for rows in (3, 4, 64)] == [
        "one_rows-wide",
        "few_rows-wide",
        "many_rows-wide",
    ]
    with pytest.raises(ValueError, match=r"\(33, 15\)"):
        wide_linear(x.bfloat16(), weight[:, 1:].bfloat16())


def test_op_passes_opcheck() -> None:
    x, weight, bias = inputs((7,), 5, 16)
    wide = [one.detach().bfloat16().requires_grad_() for one in (x, weight)]
    torch.library.opcheck(wide_linear_op.op, tuple(wide))
    torch.library.opcheck(linear_op.op, (x, weight, bias))
    torch.library.opcheck(linear_op.op, (x, weight.detach(), torch.empty(0)))


def test_reference_gradient_is_its_derivative() -> None:
    given = [one.detach().double().requires_grad_() for one in inputs((3,), 4, 5)]
    assert torch.autograd.gradcheck(linear_reference, given)


def test_a_class_says_how_many_rows_and_what_gets_a_gradient() -> None:
    x, weight, _ = inputs((3,), 4, 5)
    frozen = weight.detach()
    assert shape_class(3, x, weight) == "one_rows-trained"
    assert shape_class(4, x, frozen) == "few_rows-frozen"
    assert shape_class(64, x.detach(), frozen) == "many_rows-no_gradient"
    with torch.no_grad():
        assert shape_class(64, x, weight) == "many_rows-no_gradient"


def test_auto_is_eager_where_kernels_cannot_run() -> None:
    x, weight, bias = (one.detach().double() for one in inputs((3,), 4, 5))
    assert torch.equal(linear(x, weight, bias), linear_reference(x, weight, bias))
    with pytest.raises(ValueError, match="float64"):
        linear(x, weight, bias, impl="cpu")
    with pytest.raises(ValueError, match="'triton' is not there for linear"):
        linear(x.float(), weight.float(), impl="triton")


def test_linear_refuses_wrong_inputs() -> None:
    x, weight, bias = (one.detach() for one in inputs((3,), 4, 5))
    with pytest.raises(ValueError, match=r"\(4, 4\)"):
        linear(x, weight[:, 1:])
    with pytest.raises(ValueError, match=r"\(3,\)"):
        linear(x, weight, bias[1:])
    with pytest.raises(ValueError, match="bfloat16"):
        linear(x.bfloat16(), weight)
