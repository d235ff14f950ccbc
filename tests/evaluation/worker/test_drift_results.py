"""Drift of records made by hand: value, sign and unit of each number, and what a failure does to it."""

from __future__ import annotations

import math
from collections.abc import Collection

import pytest

from luthier.errors import FailedPrecondition, Reason
from luthier.errors.status import failure_to_status
from luthier.evaluation.worker import drift_results
from luthier.evaluation.worker.drift_results import ArmRecords, drift_of, drift_warnings
from luthier.evaluation.worker.drift_suite import general, suite_questions
from luthier.evaluation.worker.exact_drift import chosen
from luthier.evaluation.worker.questions import failure_of
from luthier.grading.suite import general_suite, general_texts
from luthier.text.rendering import Rendered
from luthier.v1.evaluation_pb2 import DriftResult
from luthier.worker.v1.task_pb2 import AnsweredRecord

ROWS = [0, 1, 2, 3, 50]
SUITE = general_suite()
ASKED = general([suite_questions()[row] for row in ROWS])
TEXTS = (*general_texts()[1:], "Zwölf größere Öfen stehen über dem schönen Fluß, сказал он: 東京は大きい。")
ERROR = failure_to_status(failure_of(FailedPrecondition("broken weights", reason=Reason.MODEL_INVALID)))


@pytest.fixture(autouse=True)
def texts_of_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift_results, "general_texts", lambda: TEXTS)


def failed(row: int) -> AnsweredRecord:
    return AnsweredRecord(row=row, error=ERROR)


def said(right: Collection[int], lost: Collection[int] = ()) -> list[AnsweredRecord]:
    """Answers to the asked questions, by place: right, wrong, or none."""
    return [
        failed(place)
        if place in lost
        else AnsweredRecord(row=place, text=SUITE[row].reference if place in right else "blorp")
        for place, row in enumerate(ROWS)
    ]


def found(likely: float, drawn: float) -> list[AnsweredRecord]:
    """What is found of every answer, so many nats each; the first has four tokens, each next one more."""
    count = len(ROWS)
    return [
        AnsweredRecord(
            row=place,
            nll=likely if place < count else drawn,
            num_reference_tokens=4 + place % count,
        )
        for place in range(2 * count)
    ]


def read(bits: list[float]) -> list[AnsweredRecord]:
    return [
        AnsweredRecord(row=row, nll=one * math.log(2), num_reference_tokens=9) for row, one in enumerate(bits)
    ]


EVEN = [2.0 * len(text.encode()) for text in TEXTS]
"""Two bits for each byte."""
BASELINE = ArmRecords(said=said({0, 1, 2, 3}), found=found(3.0, 5.0), read=read(EVEN))


def drifted(mine: ArmRecords, baseline: ArmRecords = BASELINE) -> DriftResult:
    return drift_of(DriftResult(arm_id="tuned", baseline_arm_id="base"), ASKED, mine, baseline)


def arm(**changes: object) -> ArmRecords:
    same = {"said": BASELINE.said, "found": BASELINE.found, "read": BASELINE.read}
    return ArmRecords(**{**same, **changes})  # type: ignore[arg-type]


def test_general_text_is_told_in_bits_a_byte_and_more_is_worse() -> None:
    assert any(len(text) != len(text.encode()) for text in TEXTS), "a byte is not a character"
    worse = drifted(arm(read=read([2.5 * len(text.encode()) for text in TEXTS])))
    assert worse.baseline_text_bits == pytest.approx(2.0)
    assert worse.text_loss.value == pytest.approx(0.5)
    assert worse.text_loss.count == len(TEXTS)
    bounds = (worse.text_loss.lower, worse.text_loss.upper)
    assert bounds == pytest.approx((0.5, 0.5)), "each byte lost the same"
    better = drifted(arm(read=read([1.5 * len(text.encode()) for text in TEXTS])))
    assert better.text_loss.value == pytest.approx(-0.5)
    extra = [100.0, *(0.0 for _ in TEXTS[1:])]
    uneven = drifted(arm(read=read([one + more for one, more in zip(EVEN, extra, strict=True)])))
    assert uneven.text_loss.value == pytest.approx(100 / sum(len(text.encode()) for text in TEXTS))
    assert uneven.text_loss.lower < 0 < uneven.text_loss.upper, "one paragraph shows nothing"


def test_divergence_is_told_in_nats_a_token_and_less_likely_is_more() -> None:
    result = drifted(arm(found=found(3.6, 6.2)))
    tokens = sum(4 + place for place in range(len(ROWS)))
    assert result.num_drawn_tokens == tokens
    assert result.greedy_divergence.value == pytest.approx(len(ROWS) * 0.6 / tokens)
    assert result.divergence.value == pytest.approx(len(ROWS) * 1.2 / tokens)
    assert result.divergence.count == len(ROWS)
    assert result.divergence.lower < result.divergence.value < result.divergence.upper


def test_one_answer_has_no_interval() -> None:
    only = [AnsweredRecord(row=place) for place in range(2 * len(ROWS))]
    mine, other = ([*only[:-1], AnsweredRecord(row=9, nll=nll, num_reference_tokens=2)] for nll in (5.0, 4.0))
    result = drifted(arm(found=mine), arm(found=other))
    assert (result.divergence.value, result.divergence.count) == (0.5, 1)
    assert (result.divergence.lower, result.divergence.upper) == (0.5, 0.5)
    assert not result.HasField("greedy_divergence")


def test_what_a_tuned_arm_cannot_answer_is_not_kept() -> None:
    result = drifted(arm(said=said({0}, lost={1, 2, 3, 4})))
    assert (result.retained.value, result.retained.count) == (0.25, 4)
    assert sum(skill.num_asked for skill in result.skills) == len(ROWS)


def test_what_the_baseline_cannot_answer_is_not_asked() -> None:
    result = drifted(arm(said=said({0, 1, 2, 3, 4})), arm(said=said({0}, lost={1, 2, 3})))
    assert (result.retained.value, result.retained.count) == (1.0, 1)
    assert sum(skill.num_asked for skill in result.skills) == 2
    assert result.num_unanswered == 3
    assert sum(skill.num_gained for skill in result.skills) == 1
    nothing = drifted(BASELINE, arm(said=said(set(), lost=range(len(ROWS)))))
    assert not nothing.HasField("retained")
    assert not nothing.skills


def test_a_loss_that_is_not_finite_is_said_and_leaves_its_estimate_unset() -> None:
    broken = found(3.0, 5.0)
    broken[-1] = failed(9)
    texts = read(EVEN)
    texts[0] = failed(0)
    mine = arm(found=broken, read=texts)
    result = drifted(mine)
    assert not result.HasField("divergence")
    assert not result.HasField("text_loss")
    assert result.greedy_divergence.value == 0, "no failure is among the most likely answers"
    assert result.baseline_text_bits == pytest.approx(2.0)
    assert result.num_drawn_tokens > 0, "so that nobody takes its tokens for others"
    warnings = list(drift_warnings("tuned", mine, is_baseline=False))
    assert len(warnings) == 2
    assert "tuned has no finite likelihood for 1 of 10 answers of the baseline, so that" in warnings[0]
    assert f"for 1 of {len(TEXTS)} general texts" in warnings[1]
    assert all("broken weights" in one for one in warnings)
    assert not list(drift_warnings("base", BASELINE, is_baseline=True))


def test_what_the_baseline_has_no_number_for_is_left_out() -> None:
    texts = read(EVEN)
    texts[0] = failed(0)
    result = drifted(arm(read=read([3.0 * len(text.encode()) for text in TEXTS])), arm(read=texts))
    assert result.text_loss.value == pytest.approx(1.0)
    assert result.text_loss.count == len(TEXTS) - 1
    (warning,) = drift_warnings("base", arm(read=texts), is_baseline=True)
    assert warning.startswith(
        "drift: arm base has no finite likelihood for 1 of 12 general texts, which are left out"
    )


def test_other_tokens_have_no_divergence() -> None:
    result = drifted(arm(found=None))
    assert not result.HasField("divergence")
    assert result.num_drawn_tokens == 0
    assert result.text_loss.value == 0


def compared(*nats: float) -> list[AnsweredRecord]:
    return [AnsweredRecord(row=row, nll=one, num_reference_tokens=10 + row) for row, one in enumerate(nats)]


def test_the_exact_divergence_is_nats_over_tokens_and_is_left_out_where_one_failed() -> None:
    result = drifted(arm(compared=compared(*[5.0, 6.0] * 5)))
    assert result.exact_divergence.value == pytest.approx(55 / 145)
    assert result.exact_divergence.lower < 55 / 145 < result.exact_divergence.upper
    assert result.num_compared_tokens == 145
    assert not drifted(arm()).HasField("exact_divergence")
    lost = arm(compared=[*compared(5.0, 6.0), failed(2)])
    assert not drifted(lost).HasField("exact_divergence")
    (warning,) = drift_warnings("tuned", lost, is_baseline=False)
    assert warning == (
        "drift: arm tuned could not be compared word by word on 1 of 3 answers of the baseline, so that this is not "
        "measured; the first: broken weights"
    )


def test_the_exact_divergence_of_too_few_answers_is_left_out_with_a_word() -> None:
    few = arm(compared=compared(*[5.0] * 9))
    assert not drifted(few).HasField("exact_divergence")
    assert list(drift_warnings("tuned", few, is_baseline=False)) == [
        "drift: arm tuned was compared word by word on 9 answers of the baseline, which are too few to tell how sure "
        "that is: at least 10 are needed"
    ]
    assert drifted(arm(compared=compared(*[5.0] * 10))).HasField("exact_divergence")


def test_the_exact_divergence_is_never_below_nothing() -> None:
    found = drifted(arm(compared=compared(*[-1e-9, 1e-9] * 5, -1e-8))).exact_divergence
    assert (found.value, found.lower) == (0.0, 0.0)
    assert 0 <= found.upper < 1e-6


def test_few_tokens_of_each_of_many_answers_are_compared() -> None:
    texts = {
        row: Rendered(input_ids=tuple(range(300)), loss_mask=(False,) * 100 + (True,) * 200)
        for row in range(80)
    }
    found = chosen(texts, 3)
    assert [one.num_supervised for one in found] == [4] * 64
    assert all(not any(one.loss_mask[:100]) for one in found), "of the answers"
    assert len({one.loss_mask for one in found}) > 32, "not the same places of all"
    assert chosen(texts, 3) == found != chosen(texts, 4)
    assert [one.num_supervised for one in chosen({0: texts[0]}, 3)] == [200]
    assert chosen({}, 3) == []
