"""What aliases may be, and when a gate is open."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from luthier.errors import FailedPrecondition, FieldViolation, InvalidArgument, Reason
from luthier.evaluation.amounts import reached
from luthier.evaluation.completeness import lacks_answers, lacks_assessments, num_errors, rival_losses
from luthier.evaluation.evaluations.verdicts import LEAST_RECORDS, verdict_now
from luthier.grading.metrics.scores import find_score
from luthier.runtime.field_limits import (
    REQUIRED,
    Limit,
    LimitTable,
    characters,
    count,
    demanded,
    limit_violations,
    named,
    refuse,
)
from luthier.runtime.labels import DISPLAY_NAME, label_violations
from luthier.v1.evaluation_pb2 import SCORE_KIND_REAL, Evaluation, ScoreEstimate
from luthier.v1.model_alias_pb2 import AliasMove, Gate, GateResult, ModelAlias, ScoreGate, VerdictGate
from luthier.v1.model_pb2 import Model
from luthier.v1.verdict_pb2 import EvaluationVerdict, GuardResult

MAX_GATES = 16
Outcome = EvaluationVerdict.Outcome
_FINITE = Limit(rule="must be a number", allows=math.isfinite)
LIMITS: LimitTable = {
    "display_name": DISPLAY_NAME,
    "gates": count(MAX_GATES, "gates"),
    "gates[].score.score": demanded(characters(200)),
    "gates[].score.least": _FINITE,
    "gates[].score.most": _FINITE,
    "gates[].verdict.outcomes": (REQUIRED, count(len(Outcome.values()), "outcomes")),
    "gates[].verdict.outcomes[]": named(Outcome.DESCRIPTOR),
}


def check(alias: ModelAlias) -> None:
    """Raise InvalidArgument that names every field of a new alias that can never be right."""
    refuse(
        [
            *limit_violations(alias, LIMITS, "model_alias"),
            *_gate_violations(alias.gates),
            *label_violations(alias.labels, "model_alias.labels"),
        ]
    )


def require_evaluation(alias: ModelAlias, evaluation: str) -> None:
    """Raise InvalidArgument where an alias with gates is to move without an evaluation."""
    if alias.gates and not evaluation:
        description = f"must name an evaluation, as {alias.name} has {len(alias.gates)} gates; got nothing"
        raise InvalidArgument.of_fields(
            FieldViolation(field="evaluation", description=description, reason=Reason.FIELD_REQUIRED)
        )


def moved(alias: ModelAlias, model: Model, evaluation: Evaluation | None) -> ModelAlias:
    """Return an alias that stands for another model.

    Raises:
        FailedPrecondition: WRONG_STATE, the evaluation has not SUCCEEDED or is of another model;
            METRIC_NOT_MEASURED, it has not what a gate wants; ALIAS_BLOCKED, a gate is shut.
    """
    results: Sequence[GateResult] = ()
    if evaluation is not None:
        results = _results(alias, _judged_arm(evaluation, model), evaluation)
        shut = [result.sentence for result in results if not result.open]
        if shut:
            raise FailedPrecondition(
                f"{alias.name} may not move to {model.name}, {len(shut)} of {len(results)} gates are shut: "
                + "; ".join(shut),
                reason=Reason.ALIAS_BLOCKED,
                metadata={"model_alias": alias.name, "model": model.name, "evaluation": evaluation.name},
            )
    changed = ModelAlias()
    changed.CopyFrom(alias)
    move = AliasMove(
        number=alias.current.number + 1,
        model=model.name,
        model_uid=model.uid,
        model_digest=model.digest,
        gates=results,
    )
    if evaluation is not None:
        move.evaluation, move.evaluation_uid = evaluation.name, evaluation.uid
    move.move_time.GetCurrentTime()
    changed.current.CopyFrom(move)
    return changed


def _judged_arm(evaluation: Evaluation, model: Model) -> str:
    """Return the arm whose results are the model's: the judged one if it is the model's, else the first of its."""
    if evaluation.state != Evaluation.STATE_SUCCEEDED:
        state = Evaluation.State.Name(evaluation.state).removeprefix("STATE_")
        raise FailedPrecondition(
            f"{evaluation.name} must be SUCCEEDED to open a gate, it is {state}", reason=Reason.WRONG_STATE
        )
    uids = {reference.uid for reference in evaluation.references if reference.name == model.name}
    arms = [arm.arm_id for arm in evaluation.arms if arm.model == model.name]
    if model.uid not in uids or not arms:
        asked = ", ".join(sorted({arm.model for arm in evaluation.arms}))
        raise FailedPrecondition(
            f"{evaluation.name} must have asked {model.name} with uid {model.uid}, it asked {asked}",
            reason=Reason.WRONG_STATE,
            metadata={"model": model.name, "evaluation": evaluation.name},
        )
    return evaluation.candidate_arm_id if evaluation.candidate_arm_id in arms else arms[0]


def _results(alias: ModelAlias, arm_id: str, evaluation: Evaluation) -> list[GateResult]:
    return [
        _score_result(gate, gate.score, arm_id, evaluation)
        if gate.WhichOneof("gated") == "score"
        else _verdict_result(gate, gate.verdict, arm_id, evaluation)
        for gate in alias.gates
    ]


def _score_result(gate: Gate, wanted: ScoreGate, arm_id: str, evaluation: Evaluation) -> GateResult:
    scores = _scores(evaluation, arm_id)
    found = next((one for one in scores if one.score == wanted.score), None)
    if found is None:
        raise _not_measured(
            evaluation,
            wanted.score,
            f"arm {arm_id} has {', '.join(one.score for one in scores) or 'no score'}",
        )
    lost = _tells_nothing(evaluation, arm_id, found, wanted)
    if lost:
        return GateResult(gate=gate, open=False, sentence=f"{_wanted(wanted, arm_id, found)}; {lost}")
    is_least = wanted.WhichOneof("threshold") == "least"
    worse = found.lower if is_least else found.upper
    value = worse if wanted.whole_interval else found.value
    if not (value >= wanted.least if is_least else value <= wanted.most):
        return GateResult(gate=gate, open=False, sentence=_wanted(wanted, arm_id, found))
    return _unless_lost(gate, wanted, arm_id, found, evaluation)


def _unless_lost(
    gate: Gate, wanted: ScoreGate, arm_id: str, found: ScoreEstimate, evaluation: Evaluation
) -> GateResult:
    """Return an open gate, or a shut one where the records that could not be answered might keep it shut.

    Of shares: each such record counts as the worst that there is, whether the arm failed or one it is held against.
    How far numbers go nobody knows. Of a score of the records alone that the model has not learnt from it is not known
    which of the failed ones are of these: all of them count.
    """
    failed = num_errors(evaluation, arm_id)
    rivals = rival_losses(evaluation, arm_id, found.score)
    sentence = _wanted(wanted, arm_id, found)
    if not (failed or rivals.total) or found.kind == SCORE_KIND_REAL:
        return GateResult(gate=gate, open=True, sentence=sentence)
    is_least = wanted.WhichOneof("threshold") == "least"
    missing = failed + rivals.records
    whole, known = found.count + missing, found.value * found.count
    worst = max(0.0, known - rivals.parts) if is_least else min(whole, known + rivals.parts + missing)
    worst /= whole
    if worst >= wanted.least if is_least else worst <= wanted.most:
        return GateResult(gate=gate, open=True, sentence=sentence)
    who = [
        f"the {count:,} that {words} could not answer"
        for count, words in ((failed, "it"), (rivals.total, "those it is held against"))
        if count
    ]
    lost = f"with {' and '.join(who)} it may be {reached(worst, is_share=True)}"
    return GateResult(gate=gate, open=False, sentence=f"{sentence}; {lost}")


def _tells_nothing(evaluation: Evaluation, arm_id: str, found: ScoreEstimate, wanted: ScoreGate) -> str:
    """Return why no value of a score may open a gate; empty where one may."""
    if lost := lacks_answers(evaluation, arm_id):
        return lost
    if lost := lacks_assessments(evaluation, wanted.score, [arm_id]):
        return lost
    if found.count < LEAST_RECORDS:
        return f"fewer than {LEAST_RECORDS} records tell nothing"
    # Of numbers that are all alike nobody knows how far one that was not seen lies off.
    if wanted.whole_interval and found.lower >= found.upper:
        return "its interval is not known"
    return ""


def _wanted(wanted: ScoreGate, arm_id: str, found: ScoreEstimate) -> str:
    """Return in words what a gate wants of a score, and what the score is."""
    is_share = found.kind != SCORE_KIND_REAL
    is_least = wanted.WhichOneof("threshold") == "least"
    limit = reached(wanted.least if is_least else wanted.most, is_share=is_share)
    word = "at least" if is_least else "at most"
    which = "the whole interval of " if wanted.whole_interval else ""
    lower, upper = (reached(one, is_share=is_share) for one in (found.lower, found.upper))
    bounds = f" [{lower}, {upper}]" if found.lower < found.upper else ""
    return (
        f"{which}{wanted.score} of arm {arm_id} must be {word} {limit}, it is "
        f"{reached(found.value, is_share=is_share)}{bounds} on {found.count:,} records"
    )


def _scores(evaluation: Evaluation, arm_id: str) -> Sequence[ScoreEstimate]:
    """Return an arm's scores, over records that it has not learnt from where it has learnt from some."""
    clean = {one.arm_id: one.scores for one in evaluation.contamination.clean}
    return clean[arm_id] if arm_id in clean else _all_scores(evaluation, arm_id)


def _all_scores(evaluation: Evaluation, arm_id: str) -> Sequence[ScoreEstimate]:
    return next(one.scores for one in evaluation.arm_results if one.arm_id == arm_id)


def _verdict_result(gate: Gate, wanted: VerdictGate, arm_id: str, evaluation: Evaluation) -> GateResult:
    verdict = evaluation.verdict
    if not verdict.outcome or verdict.candidate_arm_id != arm_id:
        judged = f"it is about arm {verdict.candidate_arm_id}" if verdict.outcome else "it has none"
        raise _not_measured(evaluation, f"a verdict on arm {arm_id}", judged)
    verdict = verdict_now(evaluation)
    names = " or ".join(_outcome(one) for one in wanted.outcomes)
    sentence = (
        f"the verdict must be {names}, it is {_outcome(verdict.outcome)}: {verdict.sentence.rstrip('.')}"
    )
    # What a guard watches may be lost: whoever set it does not want to find out later.
    unsettled = [one for one in verdict.guards if one.standing == GuardResult.STANDING_UNDECIDED]
    if verdict.outcome in wanted.outcomes and unsettled:
        sentence += f"; no guard may be unsettled, {len(unsettled)} of {len(verdict.guards)} are"
    is_open = verdict.outcome in wanted.outcomes and not unsettled
    return GateResult(gate=gate, open=is_open, sentence=sentence)


def _outcome(outcome: Outcome.ValueType) -> str:
    return Outcome.Name(outcome).removeprefix("OUTCOME_")


def _not_measured(evaluation: Evaluation, wanted: str, found: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"a gate wants {wanted}, which {evaluation.name} has not measured: {found}",
        reason=Reason.METRIC_NOT_MEASURED,
        metadata={"evaluation": evaluation.name, "wanted": wanted},
    )


def _gate_violations(gates: Sequence[Gate]) -> Iterator[FieldViolation]:
    for index, gate in enumerate(gates):
        path = f"model_alias.gates[{index}]"
        if gate.WhichOneof("gated") is None:
            description = "must be one of score and verdict, got none"
            yield FieldViolation(field=path, description=description, reason=Reason.FIELD_REQUIRED)
        if gate.WhichOneof("gated") != "score":
            continue
        if gate.score.WhichOneof("threshold") is None:
            description = "must be one of least and most, got none"
            yield FieldViolation(
                field=f"{path}.score.threshold", description=description, reason=Reason.FIELD_REQUIRED
            )
        if gate.score.score and find_score(gate.score.score) is None:
            description = f"must be a score that a metric gives, got {gate.score.score!r}"
            field = f"{path}.score.score"
            yield FieldViolation(field=field, description=description, reason=Reason.METRIC_NOT_MEASURED)
