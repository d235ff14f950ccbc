"""Rows that are learnt and measured alike are found, whatever rendering they are of."""

from __future__ import annotations

from collections.abc import Sequence

from tests.training.recipes.pairs import Example, corpus_of_units, pairs

from luthier.training.recipes.corpus import Corpus, Split, joined
from luthier.training.recipes.mixture import Mixture, row_named
from luthier.training.recipes.overlap import Overlap, overlap


def corpus(*rows: tuple[Split, Sequence[int]]) -> Corpus:
    examples: list[tuple[Split, list[Example]]] = [
        (split, [("", list(tokens[:1]), list(tokens[1:]))]) for split, tokens in rows
    ]
    return corpus_of_units(examples)


def test_a_row_of_both_splits_is_counted_once_with_its_first_places() -> None:
    found = overlap(
        corpus(
            ("TRAIN", (5, 6, 7)),
            ("VALIDATION", (5, 6)),
            ("TRAIN", (5, 6, 8)),
            ("VALIDATION", (5, 6, 8)),
            ("TRAIN", (5, 6, 8)),
            ("VALIDATION", (5, 6, 8)),
            ("VALIDATION", (5, 6, 7)),
        )
    )
    assert found == Overlap(num_rows=3, num_validation_rows=4, validation_row=3, training_row=2)
    assert found.text(str).startswith(
        "3 of 4 validation rows have the tokens of training rows, the first is row 3, which is row 2 in training"
    )


def test_rows_that_differ_in_one_token_or_in_length_are_no_overlap() -> None:
    assert overlap(corpus(("TRAIN", (5, 6, 7)), ("VALIDATION", (5, 6, 8)), ("VALIDATION", (5, 6)))) is None
    assert overlap(corpus(("VALIDATION", (5, 6, 8)), ("VALIDATION", (5, 6, 8)))) is None
    assert overlap(Corpus()) is None


def test_pairs_of_one_seed_do_not_overlap_but_those_of_a_second_rendering_do() -> None:
    assert overlap(pairs(40)) is None
    whole, firsts = joined([pairs(40), pairs(40, validation_every=4)])
    mixture = Mixture(names=("own", "general"), first_rows=firsts, shares=(0.5, 0.5), measure="UNITS")
    found = overlap(whole)
    assert found is not None
    # Both number their pairs alike: of each fifth and of each fourth one is measured here and learnt there.
    assert (found.num_rows, found.num_validation_rows) == (2 * (6 + 8), 2 * (8 + 10))
    assert "the first is row 8 of own, which is row 8 of general in training" in found.text(
        lambda row: row_named(row, mixture)
    )
