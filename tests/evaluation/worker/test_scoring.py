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
    found = {one.score: one for one in estimates(strong)}
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
    found = {one.score: one for one in estimates(given_answers)}
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
    found = {one.score: one for one in estimates(given_answers)}
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
        lambda: estimates([scored(rouge=0.3)] * 12),
        lambda: list(differences([scored(rouge=0.3)] * 12, [scored(rouge=0.5)] * 12)),
    ):
        with pytest.raises(ValueError, match="got 'rouge'"):
            made()


def test_a_score_that_is_right_or_wrong_has_no_value_between() -> None:
    with pytest.raises(ValueError, match=r"exact_match is BINARY: its values must be 0 or 1, got \[0\.5\]"):
        estimates([scored(exact_match=0.5)])


@pytest.mark.parametrize(
    ("nll", "said"), [(math.nan, "the one at 1 is nan"), (math.inf, "the one at 1 is inf"), (1e6, "exp\\(")]
)
def test_a_loss_that_is_no_number_fails_by_name_and_gives_no_verdict(nll: float, said: str) -> None:
    good, bad = answers([1.0] * 12, [2.0] * 12), answers([1.0] * 12, [2.0, nll] + [2.0] * 10)
    for made in (lambda: estimates(bad), lambda: list(differences(good, bad))):
        with pytest.raises(FailedPrecondition, match=said) as caught:
            made()
        assert caught.value.reason == Reason.LOSS_NOT_FINITE


def test_perplexity_weighs_records_by_their_tokens() -> None:
    short = Answer(text="", finish_reason="STOP", scores={}, nll=1.0, num_tokens=1)
    long = Answer(text="", finish_reason="STOP", scores={}, nll=10.0, num_tokens=99)
    unmeasured = Answer(text="", finish_reason="STOP", scores={})
    (found,) = estimates([short, long, unmeasured])
    assert found.value == pytest.approx(math.exp(11 / 100))
    assert found.count == 2


@pytest.mark.parametrize("count", [1, 3, 12])
def test_a_share_that_all_records_have_leaves_room_for_one_that_was_not_seen(count: int) -> None:
    """A grader's score and a metric's of right or wrong must not differ in how sure they are."""
    all_right = [scored(field_match__fields=1.0, exact_match=1.0)] * count
    found = {one.score: one for one in estimates(all_right)}
    share, binary = found["field_match.fields"], found["exact_match"]
    assert (share.value, share.upper) == (1.0, 1.0)
    assert 0 <= share.lower <= binary.lower < 1


def test_numbers_that_do_not_scatter_do_not_tell_how_sure_they_are() -> None:
    for count in (1, 12):
        (found,) = estimates([scored(answer_length=7.0)] * count)
        assert (found.value, found.lower, found.upper) == (7.0, 7.0, 7.0), (
            "bounds that are alike are not known"
        )
    (found,) = estimates([scored(answer_length=7.0), scored(answer_length=9.0)])
    assert found.lower < 7
    assert found.upper > 9


def test_an_arm_is_as_sure_of_its_score_as_its_difference_from_nothing() -> None:
    values = [0.2, 0.4, 0.4, 0.8, 1.0, 0.0, 0.6, 0.6, 0.2, 0.4, 0.8, 0.6]
    mine = [scored(field_match__fields=value, answer_length=10 * value) for value in values]
    nothing = [scored(field_match__fields=1 - value, answer_length=0.0) for value in values]
    found = {one.score: one for one in estimates(mine)}
    held = {name: one.interval(0.95) for name, one in differences(mine, nothing)}
    length, share = held["answer_length"], held["field_match.fields"]
    assert (found["answer_length"].lower, found["answer_length"].upper) == (length.lower, length.upper)
    assert found["field_match.fields"].lower == pytest.approx((share.lower + 1) / 2)
    assert found["field_match.fields"].upper == pytest.approx((share.upper + 1) / 2)
