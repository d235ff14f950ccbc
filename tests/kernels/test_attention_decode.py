"""Attention of new tokens over caches: against float64, on every instruction set of this machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from luthier.kernels.attention_decode import (
    Cached,
    NewTokens,
    Span,
    attention_decode,
    count_tokens,
    implementation,
)
from luthier.kernels.dispatch import Isa
from luthier.kernels.tables import Impl, force_impl, rows_apart


class Shape(NamedTuple):
    """Rows, tokens held and tokens of the prefix of each cache; new columns, heads, key heads, head size, turned."""

    caches: tuple[tuple[int, int, int], ...]
    sizes: tuple[int, int, int, int, int]


class Problem(NamedTuple):
    new: NewTokens
    caches: list[Cached]
    spans: list[Span]
    first: list[int]

    def to(self, dtype: torch.dtype) -> Problem:
        """Copies of everything in another type."""

        def copied(tensors: Any) -> Any:
            return None if tensors is None else tuple(one.to(dtype, copy=True) for one in tensors)

        query, key, value = copied(self.new[:3])
        new = NewTokens(query, key, value, copied(self.new.angles))
        caches = []
        for one in self.caches:
            key, value = copied((one.key_BGCD, one.value_BGCD))
            caches.append(Cached(key, value, copied(one.prefix)))
        return Problem(new, caches, self.spans, self.first)

    def of_tokens(self, tokens: Any) -> NewTokens:
        """Some of the new tokens, by their numbers."""
        query, key, value, angles = self.new
        turned = None if angles is None else (angles[0][tokens], angles[1][tokens])
        return NewTokens(query[tokens], key[tokens], value[tokens], turned)

    def of_cache(self, index: int) -> Problem:
        """The problem of the rows of one cache alone, over a copy of it."""
        start = sum(one.layout.num_rows for one in self.caches[:index])
        rows = slice(start, start + self.caches[index].layout.num_rows)
        before = count_tokens(self.caches[:index], self.spans[:index], self.first[:start])
        caches, spans, first = [self.caches[index]], [self.spans[index]], self.first[rows]
        new = self.of_tokens(slice(before, before + count_tokens(caches, spans, first)))
        return Problem(new, caches, spans, first).to(self.new.query.dtype)

    def pieces(self, columns: int) -> Tensor:
        """What comes out where so many columns of each cache come at a time, in the order of the whole."""
        problem = self.to(self.new.query.dtype)
        places = [
            (column - begin, number)
            for number, (column, begin) in enumerate(
                (column, begin)
                for one, (begin, end), start in zip(self.caches, self.spans, self._first_rows(), strict=True)
                for row in range(one.layout.num_rows)
                for column in range(max(begin, self.first[start + row]), end)
            )
        ]
        output = torch.full_like(self.new.query, float("nan"))
        for begin in range(0, max(end - start for start, end in self.spans), columns):
            tokens = [number for place, number in places if begin <= place < begin + columns]
            spans = [(start + begin, min(start + begin + columns, end)) for start, end in self.spans]
            part = problem._replace(new=problem.of_tokens(tokens), spans=spans)
            output[tokens] = part.run(scale=self.new.query.shape[2] ** -0.5)
        return output

    def _first_rows(self) -> list[int]:
        counts = [one.layout.num_rows for one in self.caches]
        return [sum(counts[:index]) for index in range(len(counts))]

    def run(self, impl: Any = "cpu", **options: Any) -> Tensor:
        scale = options.pop("scale", self.new.query.shape[2] ** -0.5)
        return attention_decode(
            self.new, self.caches, self.spans, self.first, scale=scale, impl=impl, **options
        )


SHAPES = [
    Shape(((1, 0, 0),), (1, 1, 1, 1, 0)),
    Shape(((5, 70, 0),), (1, 9, 3, 64, 64)),
    Shape(((1, 9, 0), (3, 300, 0), (2, 64, 0)), (1, 6, 2, 24, 0)),
    Shape(((40, 20, 300), (1, 3, 1)), (1, 4, 1, 64, 32)),
    Shape(((3, 700, 5), (2, 0, 257)), (1, 2, 2, 33, 0)),
    Shape(((2, 255, 0), (2, 6, 9)), (3, 4, 2, 80, 16)),
    Shape(((3, 0, 0), (1, 200, 300), (2, 0, 7)), (130, 3, 1, 24, 24)),
]


def problem_of(shape: Shape, seed: int = 0) -> Problem:
    """Values are those of bfloat16, so that all types see the same."""
    generator = torch.Generator().manual_seed(seed)
    num_new, heads, key_heads, size, turned = shape.sizes

    def drawn(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).bfloat16().float()

    caches, first = [], []
    for count, held, before in shape.caches:
        capacity = held + num_new + 3
        prefix = (drawn(key_heads, before, size), drawn(key_heads, before, size)) if before else None
        caches.append(
            Cached(drawn(count, key_heads, capacity, size), drawn(count, key_heads, capacity, size), prefix)
        )
        # Of padding that ends early, late, and among the new columns; of one column all rows have a token.
        first += [(0, held // 3, held + num_new // 2)[row % 3] for row in range(count)]
    spans = [(held, held + num_new) for _, held, _ in shape.caches]
    tokens = count_tokens(caches, spans, first)
    angles = (drawn(tokens, turned), drawn(tokens, turned)) if turned else None
    new = NewTokens(
        drawn(tokens, heads, size), drawn(tokens, key_heads, size), drawn(tokens, key_heads, size), angles
    )
    return Problem(new, caches, spans, first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_cpu_is_no_less_exact_than_eager(isa: Isa, dtype: torch.dtype, softcap: float, shape: Shape) -> None:
    problem = problem_of(shape)
    exact, ours, theirs = (problem.to(one) for one in (torch.float64, dtype, dtype))
    wanted = exact.run("eager", softcap=softcap)
    got, other = ours.run(softcap=softcap), theirs.run("eager", softcap=softcap)
    assert got.shape == wanted.shape
    assert got.dtype == dtype
    few = 4 * torch.finfo(torch.float32).eps * wanted.norm() + torch.finfo(dtype).eps * wanted.abs().max()
    assert (got.double() - wanted).norm() <= 2 * (other.double() - wanted).norm() + few
    for mine, reference in zip(ours.caches, theirs.caches, strict=True):
        # Turned keys may be a rounding apart, everything else is a copy.
        assert torch.equal(mine.value_BGCD, reference.value_BGCD)
        assert torch.allclose(
            mine.key_BGCD.float(), reference.key_BGCD.float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-2
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_cpu_bits_depend_neither_on_threads_nor_on_other_caches(
    isa: Isa,
    dtype: torch.dtype,
    shape: Shape,
    same_for_threads: Callable[..., None],
) -> None:
    problem = problem_of(shape).to(dtype)
    same_for_threads(lambda: [problem.to(dtype).run()])
    alone = [problem.of_cache(index).run() for index in range(len(problem.caches))]
    assert torch.equal(problem.to(dtype).run(), torch.cat(alone))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape.sizes[0] > 1])
@pytest.mark.parametrize("columns", [1, 7, 100])
def test_cpu_bits_do_not_depend_on_which_tokens_come_together(
    isa: Isa, dtype: torch.dtype, shape: Shape, columns: int
) -> None:
    problem = problem_of(shape).to(dtype)
    assert torch.equal(problem.pieces(columns), problem.to(dtype).run())


def test_cpu_bits_do_not_depend_on_how_much_is_kept_at_a_time(isa: Isa) -> None:
    """As many tokens as leave more sums than there is room for: they go in several goes."""
    problem = problem_of(Shape(((5, 0, 1500),), (900, 8, 1, 8, 0))).to(torch.bfloat16)
    # Rows of 64 sums, for each head and each 256 keys.
    assert len(problem.new.query) * 8 * (1500 // 256) * 64 > 1 << 23
    whole = problem.to(torch.bfloat16).run()
    assert torch.equal(problem.pieces(50), whole)
    assert torch.equal(problem.pieces(450), whole)


def test_rows_that_begin_later_have_no_new_token(isa: Isa) -> None:
    problem = problem_of(Shape(((3, 70, 4),), (1, 4, 2, 64, 0))).to(torch.bfloat16)
    problem = problem._replace(first=[0, 71, 5])
    alone = problem._replace(new=problem.of_tokens([0, 2])).to(torch.bfloat16)
    impls: tuple[Impl, ...] = ("cpu", "eager")
    for impl in impls:
        keys = alone.caches[0].key_BGCD[1].clone()
        assert len(alone.run(impl)) == 2
        assert torch.equal(alone.caches[0].key_BGCD[1], keys)


def test_cpu_bits_depend_neither_on_padding_nor_on_other_rows(isa: Isa) -> None:
    problem = problem_of(Shape(((6, 600, 130),), (1, 4, 2, 64, 0))).to(torch.bfloat16)
    problem = problem._replace(first=[0, 17, 300, 550, 600, 5])
    whole = problem.to(torch.bfloat16).run()
    for row, first in enumerate(problem.first):
        one = problem.caches[0]
        key, value = (part[row : row + 1, :, first:].contiguous() for part in (one.key_BGCD, one.value_BGCD))
        own = Cached(key, value, one.prefix)
        new = problem.of_tokens(slice(row, row + 1))
        alone = Problem(new, [own], [(600 - first, 601 - first)], [0]).run()
        assert torch.equal(alone, whole[row : row + 1])


def test_cpu_takes_views_that_lie_apart(isa: Isa) -> None:
    problem = problem_of(SHAPES[2]).to(torch.bfloat16)
    wanted = problem.to(torch.bfloat16).run()
    joined = torch.cat(problem.new[:3], dim=1)
    heads = [one.shape[1] for one in problem.new[:3]]
    query, key, value = torch.split(joined, heads, dim=1)
    assert not query.is_contiguous()
    apart = problem.to(torch.bfloat16)._replace(new=NewTokens(query, key, value))
    assert torch.equal(apart.run(), wanted)


def test_cpu_reads_nothing_that_a_row_does_not_see(isa: Isa) -> None:
    problem = problem_of(Shape(((3, 70, 4),), (1, 4, 2, 64, 0))).to(torch.bfloat16)
    wanted = problem.to(torch.bfloat16).run()
    hidden = problem.to(torch.bfloat16)
    for row, first in enumerate(problem.first):
        for part in (hidden.caches[0].key_BGCD, hidden.caches[0].value_BGCD):
            part[row, :, : min(first, 70)] = float("nan")
            part[row, :, 71:] = float("nan")
    assert torch.equal(hidden.run(), wanted)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_cpu_keeps_what_is_no_number_within_its_row(isa: Isa, value: float) -> None:
    problem = problem_of(Shape(((4, 300, 270),), (1, 2, 1, 16, 0)))
    problem = problem.to(torch.bfloat16)._replace(first=[0, 0, 299, 0])
    problem.new.query[1, 1, 3] = value
    output = problem.run()
    assert output[1, 1].isnan().all()
    output[1, 1] = 0.0
    assert output.isfinite().all()


def test_no_rows_give_no_output(isa: Isa) -> None:
    empty = torch.empty(0, 2, 8)
    impls: tuple[Impl, ...] = ("cpu", "eager")
    for impl in impls:
        new = NewTokens(torch.empty(0, 4, 8), empty, empty)
        assert attention_decode(new, [], [], [], scale=1.0, impl=impl).shape == (0, 4, 8)


def test_auto_takes_what_can_run() -> None:
    query = torch.empty(1, 4, 8)
    with rows_apart():
        assert implementation(query, 2) == "cpu"
        assert implementation(query.double(), 2) == "eager"
        force_impl("eager")
        try:
            assert implementation(query, 2) == "eager"
        finally:
            force_impl("auto")
    assert implementation(query, 2, impl="cpu") == "cpu"


def test_wrong_inputs_are_refused() -> None:
    problem = problem_of(SHAPES[3])
    new, caches, spans, first = problem

    def refused(match: str, **changed: Any) -> None:
        with pytest.raises(ValueError, match=match):
            problem._replace(**changed).run()

    refused(r"41 of 2, got 40 first columns and 2 spans", first=first[1:])
    refused(r"40 of 1, got 41 first columns", caches=caches[:1], spans=spans[:1])
    refused(r"new tokens must be 40, .* got 41", caches=caches[:1], spans=spans[:1], first=first[:40])
    refused(r"new tokens must be 40, .* got 41", first=[21, *first[1:]])
    refused("room for 1 new tokens after 24, got a capacity of 24", spans=[(24, 25), (3, 4)])
    refused("room for 0 new tokens after 20", spans=[(20, 20), (3, 4)])
    refused("must not be negative, got -1", first=[-1, *first[1:]])
    refused(r"H a multiple of G, got .*\(41, 2, 64\)", new=new._replace(key=new.key.repeat(1, 2, 1)))
    refused("R even and at most D", new=new._replace(angles=(torch.ones(41, 3), torch.ones(41, 3))))
    refused("float64", new=new._replace(value=new.value.double()))
    refused(
        r"a cache must hold torch.float32 \[B, 1, C, 64\], got torch.bfloat16",
        caches=problem.to(torch.bfloat16).caches,
    )
    with pytest.raises(ValueError, match="impl 'cpu' needs bfloat16 or float32"):
        problem.to(torch.float64).run("cpu")
    with pytest.raises(ValueError, match="not there for attention_decode"):
        problem.run("triton")
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 5\), \(2, 3, 4, 6\)"):
        Cached(torch.ones(2, 3, 4, 5), torch.ones(2, 3, 4, 6))
    with pytest.raises(ValueError, match="dense"):
        Cached(torch.ones(2, 3, 4, 5)[:, :, 1:], torch.ones(2, 3, 3, 5))
    with pytest.raises(ValueError, match=r"\(4, 9, 5\)"):
        Cached(torch.ones(2, 3, 4, 5), torch.ones(2, 3, 4, 5), (torch.ones(4, 9, 5), torch.ones(4, 9, 5)))
