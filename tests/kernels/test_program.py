"""A program of operators: the bits of each operator by itself, for any number of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.kernels.attention_decode import Cached, NewTokens, attention_decode
from luthier.kernels.dispatch import Isa
from luthier.kernels.gated_activation import swiglu
from luthier.kernels.linear import linear
from luthier.kernels.lora_linear import Projection, lora_linear
from luthier.kernels.program import Program, Rows
from luthier.kernels.rms_norm import rms_norm

MOST, SIZE = 9, 64


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_rows", [1, 4, MOST])
def test_steps_have_the_bits_of_their_operators(isa: Isa, dtype: torch.dtype, num_rows: int) -> None:
    x, weight, bias = (drawn(*shape, dtype=dtype) for shape in ((MOST, SIZE), (SIZE, SIZE), (SIZE,)))
    a, b = drawn(4, SIZE), drawn(SIZE, 4)
    rounded_a, rounded_b = torch.empty(4, SIZE, dtype=dtype), torch.empty(SIZE, 4, dtype=dtype)
    normed, low, updated, gated = (torch.zeros(MOST, size, dtype=dtype) for size in (SIZE, 4, SIZE, SIZE))
    program = Program(dtype)
    program.round_to([(a, rounded_a, 1.0), (b, rounded_b, 0.5)])
    program.rms_norm(x.view(MOST, 4, 16), bias[:16], normed.view(MOST, 4, 16), (1e-5, 1.0))
    program.product([(normed, rounded_a, True)], low)
    program.product([(normed, weight, True), (low, rounded_b, True)], updated, bias)
    program.gated(updated, normed, gated, gelu=False)
    program.product([(gated, weight, True)], normed, None, normed)
    program.run(Rows(num_rows=num_rows, layers=[], spans=[], first=[], angles=(x, x)))

    rows = x[:num_rows]
    want = rms_norm(rows.view(-1, 4, 16), bias[:16], 1e-5, offset=1.0, impl="cpu").view(num_rows, SIZE)
    projection = Projection(weight=weight, bias=bias, a=a, b=b, scale=0.5)
    middle = lora_linear(want, projection, impl="cpu")
    assert torch.equal(updated[:num_rows], middle)
    branch = swiglu(middle, want, impl="cpu")
    assert torch.equal(gated[:num_rows], branch)
    added = want.double() + linear(branch.double(), weight.double(), impl="eager")
    assert torch.allclose(normed[:num_rows].double(), added, rtol=2 * torch.finfo(dtype).eps, atol=0.02)
    assert not updated[num_rows:].any(), "other rows are not touched"


@pytest.mark.parametrize("turns", [False, True])
def test_attention_goes_over_the_caches_of_its_layer(isa: Isa, turns: bool) -> None:
    heads = drawn(MOST, 4, 16), drawn(MOST, 2, 16), drawn(MOST, 2, 16) + 1
    angles = drawn(MOST, 8), drawn(MOST, 8) + 1
    out = torch.zeros(MOST, 4, 16)
    caches = [Cached(drawn(3, 2, 7, 16), drawn(3, 2, 7, 16) + layer) for layer in range(2)]
    copies = [Cached(one.key_BGCD.clone(), one.value_BGCD.clone()) for one in caches]
    program = Program(torch.float32)
    program.attend(heads, out, 1, turns=turns, options=(0.25, 2.0))
    program.run(
        Rows(
            num_rows=3,
            layers=[[one] for one in caches],
            spans=[[(5, 6)], [(6, 7)]],
            first=[0, 2, 1],
            angles=(angles[0][:3], angles[1][:3]),
        )
    )
    query, key, value = (one[:3] for one in heads)
    new = NewTokens(query, key, value, (angles[0][:3], angles[1][:3]) if turns else None)
    want = attention_decode(new, [copies[1]], [(6, 7)], [0, 2, 1], scale=0.25, softcap=2.0, impl="cpu")
    assert torch.equal(out[:3], want)
    assert torch.equal(caches[1].key_BGCD, copies[1].key_BGCD)
    assert torch.equal(caches[0].key_BGCD, copies[0].key_BGCD), "the other layer's is not touched"


def test_a_run_without_caches_of_a_layer_is_refused() -> None:
    heads = drawn(MOST, 4, 16), drawn(MOST, 2, 16), drawn(MOST, 2, 16)
    program = Program(torch.float32)
    program.attend(heads, torch.zeros(MOST, 4, 16), 0, turns=False, options=(1.0, 0.0))
    with pytest.raises(ValueError, match="caches for every layer"):
        program.run(Rows(num_rows=1, layers=[], spans=[], first=[0], angles=(drawn(1, 8), drawn(1, 8))))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spans": [[(7, 8)]]}, "room for 1 new tokens after 7, got a capacity of 7"),
        ({"spans": [[(-1, 0)]]}, "room for 1 new tokens after -1"),
        ({"spans": [[(6, 6)]]}, "room for 0 new tokens after 6"),
        ({"spans": []}, "shorter"),
        ({"spans": [[(5, 7)]]}, "new tokens of caches must be 3, got 6"),
        ({"first": [0, 7, 0]}, "new tokens of caches must be 3, got 2"),
        ({"layers": [[Cached(drawn(2, 2, 7, 16), drawn(2, 2, 7, 16))]]}, "hold 3 rows, got 2"),
        ({"layers": [[Cached(drawn(3, 1, 7, 16), drawn(3, 1, 7, 16))]]}, r"\[B, 2, C, 16\], got"),
        (
            {"layers": [[Cached(drawn(3, 2, 7, 16).bfloat16(), drawn(3, 2, 7, 16).bfloat16())]]},
            r"float32 \[B, 2, C, 16\], got bfloat16 \[3, 2, 7, 16\]",
        ),
        ({"first": [0, -1, 0]}, "first keys must not be negative, got -1"),
        ({"first": [0] * (MOST + 1)}, f"must hold {MOST + 1} rows, got 3"),
        ({"num_rows": MOST + 1}, f"at most {MOST} rows, got {MOST + 1}"),
        ({"angles": (drawn(3, 18), drawn(3, 18))}, "R even and at most 16"),
        ({"angles": (drawn(2, 8), drawn(2, 8))}, r"\[3, R\]"),
        ({"angles": (drawn(3, 7), drawn(3, 7))}, "R even and at most 16"),
        ({"angles": (drawn(3, 8).double(), drawn(3, 8).double())}, "float64"),
        ({"angles": (drawn(3, 8), drawn(3, 10))}, r"\(3, 8\) and torch.float32 \(3, 10\)"),
        ({"angles": (drawn(3, 16)[:, ::2], drawn(3, 8))}, "dense"),
    ],
)
def test_a_run_that_does_not_fit_its_program_writes_nothing(changes: dict[str, Any], message: str) -> None:
    heads = drawn(MOST, 4, 16), drawn(MOST, 2, 16), drawn(MOST, 2, 16)
    out = torch.zeros(MOST, 4, 16)
    program = Program(torch.float32)
    program.attend(heads, out, 0, turns=True, options=(1.0, 0.0))
    cached = Cached(drawn(3, 2, 7, 16), drawn(3, 2, 7, 16))
    before = cached.key_BGCD.clone()
    angles = drawn(3, 8), drawn(3, 8)
    fitting = Rows(num_rows=3, layers=[[cached]], spans=[[(6, 7)]], first=[0] * 3, angles=angles)
    with pytest.raises(ValueError, match=message):
        program.run(fitting._replace(**changes))
    assert torch.equal(cached.key_BGCD, before)
    assert not out.any()
    program.run(fitting)
    assert out[:3].any()


Telling = Callable[[Program], None]


@pytest.mark.parametrize(
    ("tell", "message"),
    [
        (
            lambda one: one.product([(drawn(9, 8), drawn(4, 7), True)], drawn(9, 4)),
            r"float32 \(4, 8\) .*\(4, 7\)",
        ),
        (
            lambda one: one.product([(drawn(9, 8), drawn(4, 8), False)], drawn(9, 4)),
            r"\(8, 4\) .* got .*\(4, 8\)",
        ),
        (
            lambda one: one.product([(drawn(8, 8), drawn(4, 8), True)], drawn(9, 4)),
            r"\(9, 8\) .* got .*\(8, 8\)",
        ),
        (
            lambda one: one.product([(drawn(9, 8), drawn(4, 8), True)], drawn(9, 4), drawn(3)),
            r"\(4,\) .*\(3,\)",
        ),
        (
            lambda one: one.product([(drawn(9, 8), drawn(4, 8), True)], drawn(9, 4), None, drawn(9, 5)),
            r"\(9, 4\) .* got .*\(9, 5\)",
        ),
        (lambda one: one.product([], drawn(9, 4)), "needs terms"),
        (
            lambda one: one.product([(drawn(9, 8), drawn(4, 8).bfloat16(), True)], drawn(9, 4)),
            "must be torch.float32 .* got torch.bfloat16",
        ),
        (
            lambda one: one.product([(drawn(9, 8), drawn(4, 16)[:, ::2], True)], drawn(9, 4)),
            r"dense along its rows, got .* with strides \(16, 2\)",
        ),
        (
            lambda one: one.product([(drawn(1, 8).expand(9, 8), drawn(4, 8), True)], drawn(9, 4)),
            "rows of a product's terms must be apart",
        ),
        (lambda one: one.rms_norm(drawn(9, 8), drawn(4), drawn(9, 8), (0.1, 0.0)), r"\(8,\) .* got .*\(4,\)"),
        (lambda one: one.rms_norm(drawn(9, 8), drawn(8), drawn(9, 4), (0.1, 0.0)), r"\(9, 8\) .*\(9, 4\)"),
        (lambda one: one.gated(drawn(9, 8), drawn(9, 7), drawn(9, 8), gelu=False), r"\(9, 8\) .*\(9, 7\)"),
        (
            lambda one: one.gated(drawn(9, 8), drawn(9, 8), drawn(9, 16)[:, :8], gelu=False),
            "what a gate writes must be dense",
        ),
        (
            lambda one: one.round_to([(drawn(4).bfloat16(), drawn(4), 1.0)]),
            "must be dense and float32, got torch.b",
        ),
        (lambda one: one.round_to([(drawn(4), drawn(5), 1.0)]), r"\(4,\) .*\(5,\)"),
        (
            lambda one: one.attend(
                (drawn(9, 3, 8), drawn(9, 2, 8), drawn(9, 2, 8)),
                drawn(9, 24),
                0,
                turns=False,
                options=(1.0, 0.0),
            ),
            "3 and 2 heads of 8",
        ),
        (
            lambda one: one.attend(
                (drawn(9, 2, 8), drawn(9, 2, 8), drawn(9, 1, 8)),
                drawn(9, 16),
                0,
                turns=False,
                options=(1.0, 0.0),
            ),
            r"\(9, 2, 8\) .*\(9, 1, 8\)",
        ),
        (
            lambda one: one.attend(
                (drawn(9, 2, 8), drawn(9, 2, 8), drawn(9, 2, 8)),
                drawn(8, 16),
                0,
                turns=False,
                options=(1.0, 0.0),
            ),
            r"as large as the query, got \(8, 16\)",
        ),
    ],
)
def test_a_step_whose_tensors_do_not_fit_is_refused(tell: Telling, message: str) -> None:
    program = Program(torch.float32)
    with pytest.raises(ValueError, match=message):
        tell(program)
    program.run(Rows(num_rows=1, layers=[], spans=[], first=[0], angles=(drawn(1, 8), drawn(1, 8))))


def test_programs_are_of_types_that_kernels_have() -> None:
    with pytest.raises(ValueError, match=r"bfloat16 or float32, got torch\.float64"):
        Program(torch.float64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"first": [0, 0]}, "caches must hold 2 rows, got 1"),
        ({"num_rows": 2, "angles": (1, 1, 2, 8, False)}, "new tokens of caches must be 2, got 1"),
        ({"num_rows": -1, "first": []}, "at most 9 rows, got -1"),
        ({"angles": (0, 0, 1, 8, False)}, "angles must be dense float32"),
        ({"angles": (1, 1, 1, 8, True)}, r"float32 \[1, R\], R even and at most 16, got bfloat16 \[1, 8\]"),
        ({"layers": [[(0, 0, 0, 0, 1, 7, 5, 1, 0, 2, 16, False)]]}, "an address of a cache is missing"),
        ({"layers": [[(1, 1, 0, 0, 1, 7, 5, 1, 3, 2, 16, False)]]}, "an address of a cache is missing"),
        ({"layers": [[(1, 1, 0, 0, 1, 7, 5, 1, 0, 2, 16, True)]]}, r"got bfloat16 \[1, 2, 7, 16\]"),
    ],
)
def test_the_core_itself_refuses_numbers_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    """Addresses are taken as they are: those here would end the process if anything were read."""
    heads = drawn(MOST, 4, 16), drawn(MOST, 2, 16), drawn(MOST, 2, 16)
    program = Program(torch.float32)
    program.attend(heads, drawn(MOST, 64), 0, turns=True, options=(1.0, 0.0))
    fitting: dict[str, Any] = {
        "num_rows": 1,
        "layers": [[(1, 1, 0, 0, 1, 7, 5, 1, 0, 2, 16, False)]],
        "first": [0],
        "angles": (1, 1, 1, 8, False),
    }
    with pytest.raises(ValueError, match=message):
        program._program.run(**(fitting | changes), isa="plain", num_threads=1)
