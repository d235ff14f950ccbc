"""Boundaries: what stands before an answer has the tokens that ask for it, and all tokens read as the text."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.text.conftest import KINDS, make_bundle

from luthier.text.boundaries import BoundaryEncoder
from luthier.text.tokenizer import TokenizerBundle

EXACT = sorted(set(KINDS) - {"fused"})
# Pieces that tokens of the small vocabularies join, white space of all kinds, several scripts, combining marks.
pieces = st.lists(
    st.sampled_from(
        ["the", " ", "answ", "ers", ":", "\n", "a", " user", "ü", "\u0301", "語", "👍", "<s>", "  ", "x"]
    ),
    max_size=6,
).map("".join)


def decoded(bundle: TokenizerBundle, ids: tuple[int, ...]) -> str:
    return unicodedata.normalize("NFC", bundle.decode(ids, skip_special_tokens=False))


@pytest.mark.parametrize("kind", EXACT)
@settings(max_examples=150, deadline=None)
@given(parts=st.lists(pieces, min_size=2, max_size=4))
@example(parts=["the", " user"])
def test_the_tokens_up_to_a_cut_are_those_of_the_text_up_to_it(kind: str, parts: list[str]) -> None:
    bundle = make_bundle(None, kind)
    encoder = BoundaryEncoder(bundle)
    cuts = sorted({len("".join(parts[:count])) for count in range(1, len(parts))})
    text = "".join(parts)
    whole = encoder.encode(text, cuts)
    for number, cut in enumerate(cuts):
        before = encoder.encode(text[:cut], cuts[:number]).encoding
        assert whole.counts[number] == len(before.ids)
        assert whole.encoding.ids[: len(before.ids)] == before.ids
        assert all(start >= cut for start, _ in whole.encoding.offsets[len(before.ids) :])
    plain = bundle.encode(text)
    if not whole.joined:
        assert whole.encoding.ids == plain.ids
    if not whole.inexact:
        # Of one token "▁the▁user" at a text's beginning the Metaspace decoder of `tokenizers` drops both spaces.
        written = unicodedata.normalize("NFC", text)
        assert decoded(bundle, whole.encoding.ids) in (decoded(bundle, plain.ids), written)


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("q: ", "answers"),
        ("q:", " answers"),
        ("answ", "ers"),
        ("x\n", "\nanswers"),
        ("the  ", "answers"),
        ("", "the"),
    ],
)
def test_an_answer_behind_any_prompt_reads_as_it_was_written(kind: str, before: str, after: str) -> None:
    bundle = make_bundle(None, kind)
    apart = BoundaryEncoder(bundle).encode(before + after, [len(before)])
    assert not apart.inexact
    assert decoded(bundle, apart.encoding.ids) == decoded(bundle, bundle.encode(before + after).ids)
    assert len(apart.encoding.ids) > apart.counts[0]


def test_a_boundary_inside_a_token_is_named() -> None:
    encoder = BoundaryEncoder(make_bundle(None))
    assert encoder.encode("q: answers", [3]).joined == {3}
    assert encoder.encode("q: answers", [2]).joined == set()


def test_a_tokenizer_that_cannot_go_on_is_named() -> None:
    encoder = BoundaryEncoder(make_bundle(None, "fused"))
    assert encoder.encode("the 語語", [5]).inexact == {5}  # one token of both
    assert encoder.encode("the 語a", [5]).inexact == set()


def test_answers_that_say_nothing_are_recognised() -> None:
    bundle = make_bundle(None)
    encoder = BoundaryEncoder(bundle)
    assert encoder.says_nothing(bundle.encode("<|im_end|></s>").ids)
    assert encoder.says_nothing(bundle.encode(" \n<|im_end|>").ids)
    assert not encoder.says_nothing(bundle.encode("<|im_end|>a").ids)
