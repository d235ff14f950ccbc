"""Aliases with gates, and evaluations that open or shut them."""

from __future__ import annotations

import pytest

from luthier.errors import FailedPrecondition, Reason
from luthier.evaluation.aliases.rules import moved
from luthier.v1.evaluation_pb2 import (
    SCORE_KIND_BINARY,
    SCORE_KIND_FRACTION,
    SCORE_KIND_REAL,
    ArmResult,
    Evaluation,
    EvaluationArm,
    ScoreEstimate,
)
from luthier.v1.model_alias_pb2 import Gate, ModelAlias, ScoreGate
from luthier.v1.model_pb2 import Model
from luthier.v1.verdict_pb2 import EvaluationVerdict

BASE, TUNED = (f"projects/default/models/{name}" for name in ("base", "tuned"))
MODEL = Model(name=TUNED, uid="u1", digest="d" * 64)
WINS = EvaluationVerdict.OUTCOME_FINE_TUNE_WINS


def least(score: str, value: float, *, whole: bool = False) -> Gate:
    """Return a gate that wants at least so much of a score."""
    return Gate(score=ScoreGate(score=score, least=value, whole_interval=whole))


def alias(*gates: Gate) -> ModelAlias:
    """Return an alias with gates."""
    return ModelAlias(name="projects/default/modelAliases/production", gates=gates)


def evaluation(**changes: object) -> Evaluation:
    """Return an evaluation that the tuned arm wins, with changes."""

    def result(arm_id: str, value: float) -> ArmResult:
        record = ScoreEstimate(
            score="exact_match",
            value=value,
            lower=value - 0.1,
            upper=value + 0.1,
            count=48,
            kind=SCORE_KIND_BINARY,
        )
        loss = ScoreEstimate(score="perplexity", value=3, lower=2, upper=4, count=48, kind=SCORE_KIND_REAL)
        return ArmResult(arm_id=arm_id, scores=[record, loss])

    made = Evaluation(
        name="projects/default/evaluations/e",
        uid="e1",
        state=Evaluation.STATE_SUCCEEDED,
        arms=[
            EvaluationArm(arm_id="zero", model=BASE),
            EvaluationArm(arm_id="tuned", model=TUNED, tuned=True),
        ],
        arm_results=[result("zero", 0.3), result("tuned", 0.9)],
        candidate_arm_id="tuned",
        verdict=EvaluationVerdict(outcome=WINS, sentence="Fine-tuning wins.", candidate_arm_id="tuned"),
    )
    made.references.add(name=TUNED, uid="u1")
    made.references.add(name=BASE, uid="u0")
    made.MergeFrom(Evaluation(**changes))  # type: ignore[arg-type]
    return made


def scored(score: str, count: int, bounds: tuple[float, float] = (0.8, 0.97)) -> Evaluation:
    """Return an evaluation whose tuned arm has another score too, of 0.9."""
    found = evaluation()
    lower, upper = bounds
    estimate = ScoreEstimate(
        score=score, value=0.9, lower=lower, upper=upper, count=count, kind=SCORE_KIND_FRACTION
    )
    found.arm_results[1].scores.append(estimate)
    return found


def blocked(found: Evaluation, *gates: Gate) -> str:
    """Return why gates are shut, which they are."""
    with pytest.raises(FailedPrecondition) as caught:
        moved(alias(*gates), MODEL, found)
    assert caught.value.reason == Reason.ALIAS_BLOCKED
    return caught.value.message
