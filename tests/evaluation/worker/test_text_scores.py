"""How texts are cut into what a model reads: as lm-evaluation-harness cuts them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from luthier.errors import FailedPrecondition, InvalidArgument, Reason
from luthier.evaluation.worker.order import Measured
from luthier.evaluation.worker.text_scores import scored_texts
from luthier.lm.score import SequenceScore
from luthier.v1.text_score_pb2 import TextScore, TextToScore

START = 1


class Letters:
    """An asker whose tokens are letters, with or without a token before every text."""

    def __init__(self, prefix: tuple[int, ...] = (), start: int | None = START) -> None:
        self.prefix = prefix
        self.start = start

    def raw(self, text: str) -> tuple[int, ...]:
        return (*self.prefix, *map(ord, text))

    def start_token(self) -> int | None:
        return self.start


class Recorder:
    """An engine that notes what it is to measure, and finds each token less likely by 1."""

    def __init__(self, logprob: float = -1.0) -> None:
        self.wanted: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        self.calls: list[int] = []
        self.logprob = logprob

    def measure(self, wanted: Measured, check: Any) -> list[SequenceScore]:
        assert wanted.likeliest
        self.calls.append(len(wanted.sequences))
        scores = []
        for ids, mask in zip(wanted.sequences, wanted.masks, strict=True):
            chosen = tuple(one for one, is_wanted in zip(ids, mask, strict=True) if is_wanted)
            self.wanted.append((tuple(ids[: len(ids) - len(chosen)]), chosen))
            scores.append(
                SequenceScore(logprob=self.logprob * len(chosen), num_tokens=len(chosen), is_greedy=True)
            )
        return scores


def scored(
    texts: Sequence[TextToScore], most: int = 0, asker: Letters | None = None, engine: Recorder | None = None
) -> tuple[list[TextScore], Recorder]:
    engine = engine or Recorder()
    found = scored_texts(
        cast("Any", asker or Letters()), cast("Any", engine), None, texts, most, lambda: None
    )
    return found, engine


def tokens(text: str) -> tuple[int, ...]:
    return tuple(map(ord, text))


def test_a_context_stands_before_and_is_cut_at_its_beginning() -> None:
    text = TextToScore(context="abcdef", continuation="xyz")
    (whole,), engine = scored([text])
    assert engine.wanted == [(tokens("abcdef"), tokens("xyz"))]
    assert (whole.num_tokens, whole.log_probability, whole.num_cut_tokens) == (3, -3.0, 0)
    (cut,), engine = scored([text], most=5)
    # The model reads five tokens: the last one is only foretold.
    assert engine.wanted == [(tokens("def"), tokens("xyz"))]
    assert cut.num_cut_tokens == 3


@pytest.mark.parametrize("prefix", [(), (START,)])
def test_without_a_context_the_token_that_begins_texts_stands_before(prefix: tuple[int, ...]) -> None:
    _, engine = scored([TextToScore(continuation="xyz")], asker=Letters(prefix))
    assert engine.wanted == [((START,), tokens("xyz"))]
    begun = TextToScore(continuation=f"{chr(START)}xyz")
    _, engine = scored([begun], asker=Letters())
    assert engine.wanted == [((START,), tokens("xyz"))], "once"


@pytest.mark.parametrize("length", [1, 4, 5, 6, 10, 23])
def test_whole_texts_have_the_windows_of_the_harness(length: int) -> None:
    text = "abcdefghijklmnopqrstuvwxyz"[:length]
    (score,), engine = scored([TextToScore(continuation=text, rolling=True)], most=5)
    expected = [
        make_disjoint_window(window)
        for window in get_rolling_token_windows(
            token_list=list(tokens(text)), prefix_token=START, max_seq_len=5, context_len=1
        )
    ]
    assert [([*before], [*wanted]) for before, wanted in engine.wanted] == expected
    assert (score.num_tokens, score.log_probability) == (length, -float(length))


def test_others_have_their_turn_between_two_thousand_tokens() -> None:
    texts = [TextToScore(context="a" * 900, continuation="b" * 100)] * 5
    found, engine = scored(texts)
    assert engine.calls == [2, 2, 1]
    assert [score.num_tokens for score in found] == [100] * 5


def test_what_cannot_be_scored_is_named() -> None:
    fine = TextToScore(context="a", continuation="b")
    with pytest.raises(InvalidArgument, match=r"texts\[1\].continuation: must have at most 5 tokens, got 6"):
        scored([fine, TextToScore(context="a", continuation="bbbbbb")], most=5)
    with pytest.raises(InvalidArgument, match=r"texts\[0\].continuation: must have a token of its own"):
        scored([TextToScore(continuation=chr(START))])
    with pytest.raises(FailedPrecondition, match=r"texts\[0\].context must be set: the model has no token"):
        scored([TextToScore(continuation="b")], asker=Letters(start=None))
    with pytest.raises(FailedPrecondition, match=r"texts\[0\] must have a finite log-probability") as caught:
        scored([fine], engine=Recorder(float("-inf")))
    assert caught.value.reason == Reason.MODEL_INVALID
