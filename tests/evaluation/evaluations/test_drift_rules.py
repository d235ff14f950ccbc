"""What may be asked of drift, and where its guard stands."""

from __future__ import annotations

from typing import Any

import pytest
from tests.evaluation.evaluations.conftest import Bench
from tests.evaluation.evaluations.memory_peers import BASE, MORE, TUNED
from tests.evaluation.judged import evaluated

from luthier.errors import InvalidArgument, Reason
from luthier.evaluation.evaluations.drift_rules import drift_guarded
from luthier.evaluation.evaluations.verdicts import verdict_of
from luthier.v1.evaluation_pb2 import (
    DriftProbe,
    DriftResult,
    Evaluation,
    EvaluationArm,
    ScoreEstimate,
    SkillDrift,
)
from luthier.v1.verdict_pb2 import DriftGuard, EvaluationVerdict, Guard, GuardResult, ScoreGuard

PROBE = DriftProbe()
DRIFT_GUARD = Guard(drift=DriftGuard(min_retained=0.9))
BASE_ARM, TUNED_ARM, MORE_ARM = (
    EvaluationArm(arm_id=name.rsplit("/", 1)[-1], model=name) for name in (BASE, TUNED, MORE)
)
Standing = GuardResult.Standing
Outcome = EvaluationVerdict.Outcome
LITTLE = "tuned retains 10.5 % [4.2 %, 24.1 %] of what zero can do (38 questions)"


async def test_what_is_not_said_has_its_default(bench: Bench) -> None:
    made = await bench.create(arms=[TUNED_ARM, BASE_ARM], drift=PROBE, guards=[DRIFT_GUARD])
    assert (made.drift.baseline_arm_id, made.drift.max_new_tokens, made.drift.max_questions) == (
        "base",
        64,
        0,
    )
    assert made.candidate_arm_id == "tuned"
    _, spec = await bench.claim()
    assert spec.evaluate.evaluation.drift == made.drift


async def test_an_evaluation_without_a_probe_has_none(bench: Bench) -> None:
    assert not (await bench.create()).HasField("drift")


async def test_a_tuned_arm_can_be_what_another_is_held_against(bench: Bench) -> None:
    made = await bench.create(arms=[TUNED_ARM, MORE_ARM], drift=DriftProbe(baseline_arm_id="tuned"))
    assert (made.drift.baseline_arm_id, made.candidate_arm_id) == ("tuned", "more")


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        (
            {"drift": DriftProbe(baseline_arm_id="none")},
            "drift.baseline_arm_id",
            "must be one of the arms zero, tuned, got 'none'",
        ),
        ({"drift": DriftProbe(max_questions=-1)}, "drift.max_questions", "must be in 0..1000, got -1"),
        ({"drift": DriftProbe(max_new_tokens=2000)}, "drift.max_new_tokens", "must be in 1..1024, got 2000"),
        ({"guards": [DRIFT_GUARD]}, "guards[0].drift", "must be of an evaluation that measures drift"),
        (
            {"drift": PROBE, "guards": [Guard(drift=DriftGuard(min_retained=1.5))]},
            "guards[0].drift.min_retained",
            "must be in 0..1, got 1.5",
        ),
        ({"guards": [Guard()]}, "guards[0]", "must be one of score and drift, got none"),
        (
            {"guards": [Guard(score=ScoreGuard())]},
            "guards[0].score.score",
            "must be at most 200 characters, got 0",
        ),
        (
            {"drift": PROBE, "arms": [BASE_ARM]},
            "drift",
            "must be unset without a tuned arm, there is none to have forgotten",
        ),
        (
            {"drift": PROBE, "arms": [TUNED_ARM, MORE_ARM]},
            "drift.baseline_arm_id",
            "must be set, as no arm is of a model that nobody tuned; got nothing",
        ),
        (
            {"drift": DriftProbe(baseline_arm_id="tuned")},
            "drift.baseline_arm_id",
            "must be another arm than the one that is judged, got 'tuned'",
        ),
    ],
)
async def test_what_cannot_be_answered_is_refused(
    bench: Bench, changes: dict[str, object], field: str, words: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await bench.create(**changes)
    assert [one.field for one in caught.value.violations] == [f"evaluation.{field}"]
    assert words in caught.value.message


async def test_a_guard_of_what_is_not_measured_says_so(bench: Bench) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await bench.create(guards=[DRIFT_GUARD])
    assert caught.value.violations[0].reason == Reason.METRIC_NOT_MEASURED


async def test_an_arm_without_a_chat_template_has_no_suite_and_says_so_at_once(bench: Bench) -> None:
    bench.peers.templates = False
    with pytest.raises(InvalidArgument) as caught:
        await bench.create(arms=[BASE_ARM, TUNED_ARM], drift=PROBE, guards=[DRIFT_GUARD])
    (violation,) = caught.value.violations
    assert (violation.field, violation.reason) == ("evaluation.drift", Reason.METRIC_NOT_MEASURED)
    assert "got base, tuned without one; give it a chat_template" in violation.description
    given = [
        EvaluationArm(arm_id=arm.arm_id, model=arm.model, chat_template="{{ messages }}")
        for arm in (BASE_ARM, TUNED_ARM)
    ]
    assert (await bench.create(arms=given, drift=PROBE)).HasField("drift")


async def test_without_drift_no_arm_needs_a_chat_template(bench: Bench) -> None:
    bench.peers.templates = False
    assert not (await bench.create(arms=[BASE_ARM, TUNED_ARM])).HasField("drift")


@pytest.mark.parametrize(
    ("retained", "standing", "words"),
    [
        (
            (0.70, 0.60, 0.79, 100),
            Standing.STANDING_BROKEN,
            "tuned retains less than 90.0 % of what base can do",
        ),
        (
            (0.97, 0.91, 0.99, 100),
            Standing.STANDING_HELD,
            "tuned retains at least 90.0 % of what base can do",
        ),
        ((0.93, 0.86, 0.97, 100), Standing.STANDING_UNDECIDED, "tuned may retain less than 90.0 %"),
        (
            (0.10, 0.00, 0.30, 9),
            Standing.STANDING_UNDECIDED,
            "base has 9 questions of the suite right, fewer",
        ),
        (None, Standing.STANDING_UNDECIDED, "base has 0 questions of the suite right"),
        ((), Standing.STANDING_UNDECIDED, "base answered no question of the suite"),
    ],
)
def test_a_guard_stands_as_the_whole_interval_does(
    retained: tuple[float, float, float, int] | tuple[()] | None, standing: Standing.ValueType, words: str
) -> None:
    result = DriftResult(arm_id="tuned", baseline_arm_id="base")
    if retained != ():
        result.skills.append(SkillDrift(skill="facts", num_asked=100))
    if retained:
        value, lower, upper, count = retained
        result.retained.CopyFrom(ScoreEstimate(value=value, lower=lower, upper=upper, count=count))
    evaluation = Evaluation(
        candidate_arm_id="tuned",
        drift=DriftProbe(baseline_arm_id="base"),
        drift_results=[DriftResult(arm_id="other"), result],
    )
    found, sentence = drift_guarded(evaluation, DriftGuard(min_retained=0.9))
    assert found == standing
    assert sentence.startswith(words)


@pytest.mark.parametrize(
    ("num_unanswered", "standing"), [(11, Standing.STANDING_HELD), (12, Standing.STANDING_UNDECIDED)]
)
def test_a_baseline_that_fails_on_much_of_the_suite_holds_no_guard(
    num_unanswered: int, standing: Standing.ValueType
) -> None:
    result = DriftResult(arm_id="tuned", baseline_arm_id="base", num_unanswered=num_unanswered)
    result.skills.append(SkillDrift(skill="facts", num_asked=100))
    result.retained.CopyFrom(ScoreEstimate(value=0.97, lower=0.91, upper=0.99, count=90))
    evaluation = Evaluation(candidate_arm_id="tuned", drift_results=[result])
    found, sentence = drift_guarded(evaluation, DriftGuard(min_retained=0.9))
    assert found == standing
    if standing == Standing.STANDING_UNDECIDED:
        assert sentence == "base could not answer 12 of 112 questions of the suite, and 90% must be answered"


def forgetful(*guards: Guard, num_known: int = 38, **asked: Any) -> Evaluation:
    """An evaluation that tuning wins, whose tuned arm has forgotten nine tenths of what it could do."""
    wanted: dict[str, Any] = {"right": {"zero": 0}, "tuned": 30, "count": 48, "guards": guards}
    evaluation = evaluated(**(wanted | asked))
    evaluation.drift.baseline_arm_id = "zero"
    little = ScoreEstimate(value=4 / 38, lower=0.0417, upper=0.2413, count=num_known)
    skills = [SkillDrift(skill="facts", num_asked=158, num_known=num_known, num_kept=4)]
    all_of_it = ScoreEstimate(value=1, lower=0.9, upper=1, count=num_known)
    evaluation.drift_results.add(arm_id="other", baseline_arm_id="zero", retained=all_of_it, skills=skills)
    evaluation.drift_results.add(arm_id="tuned", baseline_arm_id="zero", retained=little, skills=skills)
    return evaluation


def drift_guard(least: float) -> Guard:
    return Guard(drift=DriftGuard(min_retained=least))


def test_a_win_says_in_its_sentence_what_was_forgotten_though_nobody_guards_it() -> None:
    verdict = verdict_of(forgetful())
    assert verdict.outcome == Outcome.OUTCOME_FINE_TUNE_WINS
    assert verdict.sentence.startswith(
        "Fine-tuning wins: tuned is better than zero on exact_match: +62.5 pp ["
    )
    assert verdict.sentence.endswith(f" on 48 records; {LITTLE}.")


def test_what_was_gained_is_said_beside_what_was_lost_by_the_sentence_and_by_the_guard() -> None:
    evaluation = forgetful()
    for number, result in enumerate(evaluation.drift_results):
        result.skills[0].num_gained = 3 * number
        result.skills.append(SkillDrift(skill="grammar", num_asked=9, num_gained=number))
    assert "(38 questions, 4 gained)" in verdict_of(evaluation).sentence
    assert drift_guarded(evaluation, DriftGuard(min_retained=0.2))[1].endswith("of 38 questions, 4 gained")


def test_where_drift_was_not_measured_the_sentence_has_nothing_of_it() -> None:
    evaluation = forgetful()
    evaluation.ClearField("drift")
    del evaluation.drift_results[:]
    assert verdict_of(evaluation).sentence.endswith("] on 48 records.")


@pytest.mark.parametrize(
    ("asked", "start"),
    [
        ({"right": {"zero": 30}, "tuned": 12}, "Prompting suffices: "),
        ({"right": {"zero": 20}, "tuned": 20}, "Inconclusive: "),
        ({"right": {"zero": 20}, "tuned": 20, "smallest_difference": 0.2}, "No difference that matters: "),
        ({"guards": [Guard(score=ScoreGuard(score="p"))]}, "Fine-tuning wins: "),
        (
            {"guards": [Guard(score=ScoreGuard(score="field_match.parsed"))], "parsed": (48, 20)},
            "Regressed: tuned loses more than 0.0 pp",
        ),
    ],
)
def test_every_verdict_says_what_is_retained(asked: dict[str, Any], start: str) -> None:
    sentence = verdict_of(forgetful(**asked)).sentence
    assert sentence.startswith(start)
    assert sentence.endswith(f"; {LITTLE}.")


def test_without_a_prompting_arm_what_is_retained_is_said_all_the_same() -> None:
    evaluation = forgetful()
    evaluation.arms[0].tuned = True
    assert verdict_of(evaluation).sentence == (
        f"No verdict: there is no prompting arm to hold against the others; {LITTLE}."
    )


@pytest.mark.parametrize(
    ("least", "outcome", "words", "is_said_by_guard"),
    [
        (0.0, Outcome.OUTCOME_FINE_TUNE_WINS, LITTLE, False),
        (0.2, Outcome.OUTCOME_FINE_TUNE_WINS, "not settled: tuned may retain less than 20.0 % of", True),
        (0.9, Outcome.OUTCOME_REGRESSED, "Regressed: tuned retains less than 90.0 % of", True),
    ],
)
def test_what_a_guard_says_of_it_in_the_sentence_is_not_said_twice(
    least: float, outcome: Outcome.ValueType, words: str, is_said_by_guard: bool
) -> None:
    verdict = verdict_of(forgetful(drift_guard(least)))
    assert verdict.outcome == outcome
    assert words in verdict.sentence
    assert verdict.sentence.count("10.5 % [4.2 %, 24.1 %]") == 1
    assert (verdict.guards[0].sentence in verdict.sentence) == is_said_by_guard


def test_a_guard_of_drift_behind_another_leaves_it_to_the_sentence() -> None:
    broken = Guard(score=ScoreGuard(score="field_match.parsed"))
    verdict = verdict_of(forgetful(broken, drift_guard(0.9), parsed=(48, 20)))
    assert verdict.sentence.startswith("Regressed: tuned loses")
    assert verdict.sentence.endswith(f"; {LITTLE}.")


def test_what_nobody_knows_of_it_is_said_too() -> None:
    sentence = verdict_of(forgetful(num_known=9)).sentence
    unknown = "zero has 9 questions of the suite right, fewer than the 10 that tell anything"
    assert sentence.endswith(f"on 48 records; what tuned retains is not known: {unknown}.")
