"""Gates: what may be asked for, and when one is open."""

from __future__ import annotations

import pytest
from tests.evaluation.gated import BASE, MODEL, TUNED, WINS, alias, blocked, evaluation, least, scored

from luthier.errors import FailedPrecondition, InvalidArgument, Reason
from luthier.evaluation.aliases.rules import check, moved, require_evaluation
from luthier.v1.evaluation_pb2 import (
    SCORE_KIND_BINARY,
    SCORE_KIND_REAL,
    VERDICT_BETTER,
    ArmScores,
    Comparison,
    Evaluation,
    ScoreEstimate,
)
from luthier.v1.grader_pb2 import GraderResult
from luthier.v1.judge_pb2 import JudgedPair, JudgeResult
from luthier.v1.model_alias_pb2 import Gate, ScoreGate, VerdictGate
from luthier.v1.model_pb2 import Model
from luthier.v1.verdict_pb2 import EvaluationVerdict, Guard, GuardResult, ScoreGuard


def test_an_open_gate_lets_it_move_and_says_why() -> None:
    changed = moved(alias(least("exact_match", 0.85)), MODEL, evaluation())
    current = changed.current
    assert (current.number, current.model, current.model_uid, current.evaluation_uid) == (
        1,
        TUNED,
        "u1",
        "e1",
    )
    (result,) = current.gates
    assert result.open
    assert result.sentence == (
        "exact_match of arm tuned must be at least 85.0 %, it is 90.0 % [80.0 %, 100.0 %] on 48 records"
    )
    assert current.move_time.seconds > 0
    assert moved(changed, MODEL, evaluation()).current.number == 2


@pytest.mark.parametrize(
    ("gate", "said"),
    [
        (least("exact_match", 0.95), "exact_match of arm tuned must be at least 95.0 %, it is 90.0 %"),
        (least("exact_match", 0.85, whole=True), "the whole interval of exact_match of arm tuned must be"),
        (
            Gate(score=ScoreGate(score="perplexity", most=2.5)),
            "perplexity of arm tuned must be at most 2.5, it is 3",
        ),
        (
            Gate(verdict=VerdictGate(outcomes=[EvaluationVerdict.OUTCOME_NO_DIFFERENCE])),
            "the verdict must be NO_DIFFERENCE, it is FINE_TUNE_WINS: Fine-tuning wins",
        ),
    ],
)
def test_a_shut_gate_blocks_it_with_the_numbers(gate: Gate, said: str) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        moved(alias(least("exact_match", 0.1), gate), MODEL, evaluation())
    assert caught.value.reason == Reason.ALIAS_BLOCKED
    assert "1 of 2 gates are shut" in caught.value.message
    assert said in caught.value.message


@pytest.mark.parametrize(
    ("gate", "changes", "said"),
    [
        (
            least("field_match.record", 0.5),
            {},
            "wants field_match.record, which projects/default/evaluations/e has not measured: arm tuned has "
            "exact_match, perplexity",
        ),
        (
            Gate(verdict=VerdictGate(outcomes=[WINS])),
            {"verdict": EvaluationVerdict(candidate_arm_id="zero")},
            "wants a verdict on arm tuned, which projects/default/evaluations/e has not measured: it is about arm zero",
        ),
    ],
)
def test_a_gate_on_what_was_not_measured_is_no_shut_gate(
    gate: Gate, changes: dict[str, object], said: str
) -> None:
    with pytest.raises(FailedPrecondition, match=said.replace("(", r"\(")) as caught:
        moved(alias(gate), MODEL, evaluation(**changes))
    assert caught.value.reason == Reason.METRIC_NOT_MEASURED


def test_records_that_the_model_learnt_from_open_no_gate() -> None:
    found = evaluation()
    clean = ScoreEstimate(
        score="exact_match", value=0.5, lower=0.3, upper=0.7, count=20, kind=SCORE_KIND_BINARY
    )
    found.contamination.clean.append(ArmScores(arm_id="tuned", scores=[clean]))
    with pytest.raises(FailedPrecondition, match=r"it is 50\.0 % \[30\.0 %, 70\.0 %\] on 20 records"):
        moved(alias(least("exact_match", 0.85)), MODEL, found)


@pytest.mark.parametrize("whole", [False, True])
def test_nine_records_open_no_gate(whole: bool) -> None:
    gate = least("chrf", 0.5, whole=whole)
    assert "on 9 records; fewer than 10 records tell nothing" in blocked(scored("chrf", 9), gate)
    assert moved(alias(gate), MODEL, scored("chrf", 10)).current.gates[0].open


def test_bounds_that_nobody_knows_open_no_gate_that_wants_the_whole_interval() -> None:
    """Results from before have bounds that are the value where all records were alike."""
    for bounds in ((0.9, 0.9), (0.0, 0.0)):
        found = scored("chrf", 48, bounds)
        said = blocked(found, least("chrf", 0.5, whole=True))
        assert "it is 90.0 % on 48 records; its interval is not known" in said
        assert moved(alias(least("chrf", 0.5)), MODEL, found).current.gates[0].open


@pytest.mark.parametrize(("num_errors", "is_open"), [(9, True), (10, False), (80, False)])
@pytest.mark.parametrize("kind", ["grader", "judge"])
def test_a_gate_on_what_was_seldom_graded_or_judged_is_shut(
    kind: str, num_errors: int, is_open: bool
) -> None:
    found = scored(f"{kind}.fair", 48)
    if kind == "grader":
        found.grader_results.append(GraderResult(name="fair", num_graded=96, num_errors=num_errors))
    else:
        found.judge_results.append(JudgeResult(judge_id="fair", num_asked=96, num_errors=num_errors))
    gate = least(f"{kind}.fair", 0.5)
    if is_open:
        assert moved(alias(gate), MODEL, found).current.gates[0].open
        return
    things = "grades" if kind == "grader" else "judgements"
    assert f"{96 - num_errors} of 96 {things} came of fair, and 90% must" in blocked(found, gate)


def test_grades_that_lack_of_this_arm_alone_shut_its_gate() -> None:
    """Of ten arms the last is graded by a service that has died: 90 % of all grades are there."""
    found = scored("grader.fair", 10)
    found.num_records = 48
    found.grader_results.append(GraderResult(name="fair", num_graded=480, num_errors=38))
    assert "10 of 48 grades came of fair for tuned" in blocked(found, least("grader.fair", 0.5))
    found.arm_results[1].num_errors = 4
    found.arm_results[1].scores[-1].count = 40
    assert moved(alias(least("grader.fair", 0.5)), MODEL, found).current.gates[0].open, "it answered 44"


@pytest.mark.parametrize("score", ["exact_match", "perplexity", "chrf"])
def test_an_arm_that_failed_on_many_records_opens_no_gate(score: str) -> None:
    found = scored("chrf", 43)
    found.num_records = 48
    found.arm_results[1].num_errors = 5
    gate = Gate(score=ScoreGate(score=score, least=0.1))
    assert "tuned could not answer 5 of 48 records, and 90% must be answered" in blocked(found, gate)
    found.arm_results[1].num_errors, found.arm_results[0].num_errors = 0, 40
    assert moved(alias(gate), MODEL, found).current.gates[0].open, "the other arm failed"


def test_records_that_could_not_be_answered_open_no_gate_by_not_being_there() -> None:
    """46 answers have 90 %; with two that are wrong 48 have 86.25 %, with two that are right 90.4 %."""
    found = scored("chrf", 46)
    found.num_records, found.arm_results[1].num_errors = 48, 2
    assert moved(alias(least("chrf", 0.86)), MODEL, found).current.gates[0].open
    said = blocked(found, least("chrf", 0.87))
    assert (
        "it is 90.0 % [80.0 %, 97.0 %] on 46 records; with the 2 that it could not answer it may be 86.2 %"
        in said
    )
    assert "may be 90.4 %" in blocked(found, Gate(score=ScoreGate(score="chrf", most=0.903)))
    assert moved(alias(Gate(score=ScoreGate(score="chrf", most=0.905))), MODEL, found).current.gates[0].open
    assert moved(alias(Gate(score=ScoreGate(score="perplexity", most=3))), MODEL, found).current.gates[0].open


def test_judgements_that_lack_of_a_pair_with_this_arm_shut_its_gate() -> None:
    found = scored("judge.fair", 48)
    pairs = [
        JudgedPair(arm_id="few", rival_arm_id="zero", num_errors=40, num_wins=8),
        JudgedPair(arm_id="tuned", rival_arm_id="zero", num_errors=5, num_ties=43),
    ]
    found.judge_results.append(JudgeResult(judge_id="fair", num_asked=960, num_errors=90, pairs=pairs))
    said = blocked(found, least("judge.fair", 0.5))
    assert "43 of 48 records judged in both orders came of fair for tuned and zero" in said
    pairs[1].num_errors = 4
    del found.judge_results[0].pairs[:]
    found.judge_results[0].pairs.extend(pairs)
    assert moved(alias(least("judge.fair", 0.5)), MODEL, found).current.gates[0].open


def test_a_guard_that_is_not_settled_opens_no_gate_on_the_verdict() -> None:
    gate = Gate(verdict=VerdictGate(outcomes=[WINS]))
    held = GuardResult(standing=GuardResult.STANDING_HELD)
    found = evaluation()
    found.verdict.guards.extend([held, GuardResult(standing=GuardResult.STANDING_UNDECIDED)])
    assert "it is FINE_TUNE_WINS: Fine-tuning wins; no guard may be unsettled, 1 of 2 are" in blocked(
        found, gate
    )
    found.verdict.guards[1].CopyFrom(held)
    assert moved(alias(gate), MODEL, found).current.gates[0].open


def test_what_former_versions_settled_without_an_interval_opens_no_gate() -> None:
    won = Comparison(
        candidate_arm_id="tuned",
        baseline_arm_id="zero",
        score="grader.fair",
        difference=1.0,
        lower=1.0,
        upper=1.0,
        count=48,
        kind=SCORE_KIND_REAL,
        verdict=VERDICT_BETTER,
    )
    found = evaluation(primary_score="grader.fair", comparisons=[won])
    found.verdict.score = "grader.fair"
    gate = Gate(verdict=VerdictGate(outcomes=[WINS]))
    assert "it is INCONCLUSIVE: Inconclusive: 48 records do not tell tuned from zero" in blocked(found, gate)
    found.comparisons[0].lower = 0.5
    assert moved(alias(gate), MODEL, found).current.gates[0].open, "as it is stored"
    held = GuardResult(guard=Guard(score=ScoreGuard(score="grader.kind")), standing=GuardResult.STANDING_HELD)
    found.guards.append(held.guard)
    found.verdict.guards.append(held)
    found.comparisons.add().CopyFrom(won)
    found.comparisons[1].score = "grader.kind"
    assert "no guard may be unsettled, 1 of 1 are" in blocked(found, gate)
    found.comparisons[1].lower = 0.5
    assert moved(alias(gate), MODEL, found).current.gates[0].open


@pytest.mark.parametrize(
    ("model", "changes", "said"),
    [
        (
            Model(name=TUNED, uid="another"),
            {},
            "must have asked projects/default/models/tuned with uid another",
        ),
        (
            Model(name=f"{BASE}-2", uid="u0"),
            {},
            "it asked projects/default/models/base, projects/default/models/tuned",
        ),
        (MODEL, {"state": Evaluation.STATE_FAILED}, "must be SUCCEEDED to open a gate, it is FAILED"),
    ],
)
def test_an_evaluation_of_something_else_opens_nothing(
    model: Model, changes: dict[str, object], said: str
) -> None:
    with pytest.raises(FailedPrecondition, match=said) as caught:
        moved(alias(least("exact_match", 0.1)), model, evaluation(**changes))
    assert caught.value.reason == Reason.WRONG_STATE


def test_an_alias_with_gates_wants_an_evaluation_and_one_without_does_not() -> None:
    with pytest.raises(InvalidArgument, match="has 1 gates; got nothing"):
        require_evaluation(alias(least("exact_match", 0.1)), "")
    require_evaluation(alias(), "")
    assert moved(alias(), MODEL, None).current.evaluation == ""


def test_every_fault_of_a_gate_is_named() -> None:
    bad = alias(
        Gate(),
        Gate(score=ScoreGate(score="exact_match")),
        Gate(score=ScoreGate(least=float("nan"))),
        least("rouge", 0.5),
        Gate(verdict=VerdictGate()),
        Gate(verdict=VerdictGate(outcomes=[EvaluationVerdict.OUTCOME_UNSPECIFIED])),
    )
    with pytest.raises(InvalidArgument) as caught:
        check(bad)
    named = {(one.field, one.reason) for one in caught.value.violations}
    path = "model_alias.gates"
    assert named == {
        (f"{path}[0]", Reason.FIELD_REQUIRED),
        (f"{path}[1].score.threshold", Reason.FIELD_REQUIRED),
        (f"{path}[2].score.score", Reason.FIELD_REQUIRED),
        (f"{path}[2].score.least", Reason.INVALID_FIELD),
        (f"{path}[3].score.score", Reason.METRIC_NOT_MEASURED),
        (f"{path}[4].verdict.outcomes", Reason.FIELD_REQUIRED),
        (f"{path}[5].verdict.outcomes[0]", Reason.INVALID_FIELD),
    }
