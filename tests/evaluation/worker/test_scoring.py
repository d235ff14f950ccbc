"""From answers to scores with intervals, and to differences of two arms."""

from __future__ import annotations

import math

import pytest

from luthier.errors import FailedPrecondition, Reason
from luthier.evaluation.worker.scoring import Answer, differences, estimates
from luthier.v1 import evaluation_pb2


def answers(right: list[float], nll: list[float]) -> list[Answer]:
    return [
        Answer(text="", finish_reason="STOP", scores={"exact_match": score}, nll=loss, num_tokens=10)
        for score, loss in zip(right, nll, strict=True)
    ]


def test_scores_come_with_intervals() -> None:
    strong = answers([1.0] * 18 + [0.0] * 2, [5.0] * 20)
    found = {one.score: one for one in estimates(strong, seed=1)}
    assert found["exact_match"].value == 0.9
    assert found["exact_match"].lower < 0.9 < found["exact_match"].upper


def test_arms_differ_on_each_score_that_both_have() -> None:
    weak, strong = answers([0.0] * 20, [20.0] * 20), answers([1.0] * 18 + [0.0] * 2, [5.0] * 20)
    found = dict(differences(strong, weak))
    assert found["exact_match"].value == 0.9
    assert found["exact_match"].p_value < 0.001
    assert found["perplexity"].value == pytest.approx(math.exp(0.5) - math.exp(2))
    assert [name for name, _ in differences(strong, [scored(exact_match=1.0)] * 20)] == ["exact_match"]


def scored(**scores: float) -> Answer:
    return Answer(
        text="",
        finish_reason="STOP",
        scores={name.replace("__", "."): value for name, value in scores.items()},
    )


def test_a_score_counts_the_records_that_have_it() -> None:
    # References need not have the same fields: only the second has a colour.
    given_answers = [
        scored(field_match__fields=1.0),
        scored(field_match__fields=0.5, field_match__field__colour=1.0),
    ]
    found = {one.score: one for one in estimates(given_answers, seed=0)}
    assert (found["field_match.fields"].value, found["field_match.fields"].count) == (0.75, 2)
    assert (found["field_match.field.colour"].value, found["field_match.field.colour"].count) == (1.0, 1)
    assert "perplexity" not in found


def test_results_say_what_their_score_is() -> None:
    given_answers = [
        Answer(
            text="",
            finish_reason="STOP",
            scores={"exact_match": 1.0, "field_match.fields": 0.5},
            nll=1.0,
            num_tokens=2,
        )
    ] * 3
    found = {one.score: one for one in estimates(given_answers, seed=0)}
    nfc, none = evaluation_pb2.TEXT_FORM_NFC, evaluation_pb2.TEXT_FORM_UNSPECIFIED
    higher = evaluation_pb2.SCORE_DIRECTION_HIGHER_IS_BETTER
    lower = evaluation_pb2.SCORE_DIRECTION_LOWER_IS_BETTER
    wanted = {
        "exact_match": (evaluation_pb2.SCORE_KIND_BINARY, higher, nfc),
        "field_match.fields": (evaluation_pb2.SCORE_KIND_FRACTION, higher, nfc),
        "perplexity": (evaluation_pb2.SCORE_KIND_REAL, lower, none),
    }
    assert {name: (one.kind, one.direction, one.text_form) for name, one in found.items()} == wanted


def test_a_score_that_nobody_declared_is_refused_and_never_taken_for_right_or_wrong() -> None:
    for made in (
        lambda: estimates([scored(rouge=0.3)] * 12, seed=0),
        lambda: list(differences([scored(rouge=0.3)] * 12, [scored(rouge=0.5)] * 12)),
    ):
        with pytest.raises(ValueError, match="got 'rouge'"):
            made()


def test_a_score_that_is_right_or_wrong_has_no_value_between() -> None:
    with pytest.raises(ValueError, match=r"exact_match is BINARY: its values must be 0 or 1, got \[0\.5\]"):
        estimates([scored(exact_match=0.5)], seed=0)


@pytest.mark.parametrize(
    ("nll", "said"), [(math.nan, "the one at 1 is nan"), (math.inf, "the one at 1 is inf"), (1e6, "exp\\(")]
)
def test_a_loss_that_is_no_number_fails_by_name_and_gives_no_verdict(nll: float, said: str) -> None:
    good, bad = answers([1.0] * 12, [2.0] * 12), answers([1.0] * 12, [2.0, nll] + [2.0] * 10)
    for made in (lambda: estimates(bad, seed=0), lambda: list(differences(good, bad))):
        with pytest.raises(FailedPrecondition, match=said) as caught:
            made()
        assert caught.value.reason == Reason.LOSS_NOT_FINITE


def test_perplexity_weighs_records_by_their_tokens() -> None:
    short = Answer(text="", finish_reason="STOP", scores={}, nll=1.0, num_tokens=1)
    long = Answer(text="", finish_reason="STOP", scores={}, nll=10.0, num_tokens=99)
    unmeasured = Answer(text="", finish_reason="STOP", scores={})
    (found,) = estimates([short, long, unmeasured], seed=0)
    assert found.value == pytest.approx(math.exp(11 / 100))
    assert found.count == 2
