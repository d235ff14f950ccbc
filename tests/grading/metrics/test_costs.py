"""What an answer costs: its tokens, those before it, and whether it ended by itself."""

from __future__ import annotations

import pytest

from luthier.grading.metrics.answer_length import answer_length
from luthier.grading.metrics.measured import score_answer
from luthier.grading.metrics.prompt_tokens import prompt_tokens
from luthier.grading.metrics.said import Said
from luthier.grading.metrics.scores import ScoreKind, score_named
from luthier.grading.metrics.stop_rate import stop_rate

SAID = Said(text="a b", reference="", num_tokens=2, num_prompt_tokens=40, is_ended=False)


def test_each_is_read_off_the_record() -> None:
    assert answer_length(SAID) == {"answer_length": 2.0}
    assert prompt_tokens(SAID) == {"prompt_tokens": 40.0}
    assert stop_rate(SAID) == {"stop_rate": 0.0}
    assert score_answer(["ANSWER_LENGTH", "STOP_RATE", "PROMPT_TOKENS"], SAID) == {
        "answer_length": 2.0,
        "stop_rate": 0.0,
        "prompt_tokens": 40.0,
    }


@pytest.mark.parametrize(
    ("name", "kind", "higher_is_better"),
    [
        ("answer_length", ScoreKind.REAL, False),
        ("prompt_tokens", ScoreKind.REAL, False),
        ("stop_rate", ScoreKind.BINARY, True),
        ("bits_per_byte", ScoreKind.REAL, False),
        ("preference.accuracy", ScoreKind.BINARY, True),
        ("preference.margin", ScoreKind.REAL, True),
        ("multiple_choice.accuracy_norm", ScoreKind.BINARY, True),
        ("chrf", ScoreKind.FRACTION, True),
        ("bleu", ScoreKind.FRACTION, True),
        ("rouge.longest", ScoreKind.FRACTION, True),
    ],
)
def test_each_score_says_what_values_it_has_and_which_are_better(
    name: str, kind: ScoreKind, higher_is_better: bool
) -> None:
    score = score_named(name)
    assert (score.kind, score.higher_is_better) == (kind, higher_is_better)
    assert not score.whole_answer
