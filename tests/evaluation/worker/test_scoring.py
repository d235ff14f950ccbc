"""From answers to scores with intervals and paired comparisons."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.errors import FailedPrecondition, Reason
from luthier.evaluation.worker.scoring import Answer, compare, estimates
from luthier.v1 import evaluation_pb2


def answers(right: list[float], nll: list[float]) -> list[Answer]:
    return [
        Answer(text="", finish_reason="STOP", scores={"exact_match": score}, nll=loss, num_tokens=10)
        for score, loss in zip(right, nll, strict=True)
    ]


def test_scores_come_with_intervals_and_paired_comparisons() -> None:
    weak = answers([0.0] * 20, [20.0] * 20)
    strong = answers([1.0] * 18 + [0.0] * 2, [5.0] * 20)
    found = {one.score: one for one in estimates(strong, seed=1)}
    assert found["exact_match"].value == 0.9
    assert found["exact_match"].lower < 0.9 < found["exact_match"].upper
    compared = {one.score: one for one in compare("tuned", strong, "zero", weak, seed=1)}
    assert compared["exact_match"].verdict == evaluation_pb2.VERDICT_BETTER
    assert compared["exact_match"].p_value < 0.001
    # Lower perplexity is better, and has no p-value.
    assert compared["perplexity"].difference < 0
    assert compared["perplexity"].verdict == evaluation_pb2.VERDICT_BETTER
    assert not compared["perplexity"].HasField("p_value")


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


def test_only_what_is_right_or_wrong_has_a_p_value() -> None:
    left = [scored(field_match__fields=0.5, field_match__record=0.0)] * 12
    right = [scored(field_match__fields=1.0, field_match__record=1.0)] * 12
    compared = {one.score: one for one in compare("right", right, "left", left, seed=0)}
    assert compared["field_match.record"].p_value == 2 / 2**12
    assert not compared["field_match.fields"].HasField("p_value")
    assert compared["field_match.fields"].difference == 0.5
    assert compared["field_match.fields"].verdict == evaluation_pb2.VERDICT_BETTER


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
    compared = {one.score: one for one in compare("a", given_answers, "b", given_answers, seed=0)}
    nfc, none = evaluation_pb2.TEXT_FORM_NFC, evaluation_pb2.TEXT_FORM_UNSPECIFIED
    higher = evaluation_pb2.SCORE_DIRECTION_HIGHER_IS_BETTER
    lower = evaluation_pb2.SCORE_DIRECTION_LOWER_IS_BETTER
    wanted = {
        "exact_match": (evaluation_pb2.SCORE_KIND_BINARY, higher, nfc),
        "field_match.fields": (evaluation_pb2.SCORE_KIND_FRACTION, higher, nfc),
        "perplexity": (evaluation_pb2.SCORE_KIND_REAL, lower, none),
    }
    assert {name: (one.kind, one.direction, one.text_form) for name, one in found.items()} == wanted
    assert {name: (one.kind, one.direction) for name, one in compared.items()} == {
        name: (kind, direction) for name, (kind, direction, _) in wanted.items()
    }


def test_a_score_that_nobody_declared_is_refused_and_never_taken_for_right_or_wrong() -> None:
    for made in (
        lambda: estimates([scored(rouge=0.3)] * 12, seed=0),
        lambda: compare("a", [scored(rouge=0.3)] * 12, "b", [scored(rouge=0.5)] * 12, seed=0),
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
    for made in (lambda: estimates(bad, seed=0), lambda: compare("a", good, "b", bad, seed=0)):
        with pytest.raises(FailedPrecondition, match=said) as caught:
            made()
        assert caught.value.reason == Reason.LOSS_NOT_FINITE


def test_few_pairs_are_no_evidence_however_clear() -> None:
    compared = compare("b", answers([1.0] * 9, [1.0] * 9), "a", answers([0.0] * 9, [9.0] * 9), seed=0)
    assert {one.verdict for one in compared} == {evaluation_pb2.VERDICT_INSUFFICIENT_EVIDENCE}


def test_perplexity_weighs_records_by_their_tokens() -> None:
    short = Answer(text="", finish_reason="STOP", scores={}, nll=1.0, num_tokens=1)
    long = Answer(text="", finish_reason="STOP", scores={}, nll=10.0, num_tokens=99)
    unmeasured = Answer(text="", finish_reason="STOP", scores={})
    (found,) = estimates([short, long, unmeasured], seed=0)
    assert found.value == pytest.approx(math.exp(11 / 100))
    assert found.count == 2


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_arms_in_the_other_order_give_the_opposite(pairs: list[tuple[bool, bool]]) -> None:
    left = answers([float(one) for one, _ in pairs], [1.0] * len(pairs))
    right = answers([float(two) for _, two in pairs], [2.0] * len(pairs))
    for there, back in zip(compare("a", left, "b", right, 5), compare("b", right, "a", left, 5), strict=True):
        assert there.difference == pytest.approx(-back.difference)
        assert there.lower == pytest.approx(-back.upper)
        assert there.upper == pytest.approx(-back.lower)
        assert there.p_value == back.p_value
