"""What judges of an evaluation may be: who is asked, in which manner, and what a worker says of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from datetime import date

from luthier.errors import FieldViolation, InvalidArgument, Reason
from luthier.evaluation.asking import as_taught
from luthier.evaluation.bases import base_name
from luthier.evaluation.judgements import judgements_a_record
from luthier.evaluation.names import WEIGHTS
from luthier.grading.metrics.scores import JUDGED
from luthier.runtime.field_limits import (
    ANY,
    LimitTable,
    characters,
    count,
    demanded,
    positive,
    under,
    whole,
)
from luthier.runtime.names import ID_LIMIT
from luthier.runtime.result_limits import TEXT
from luthier.v1.evaluation_pb2 import Evaluation, EvaluationArm
from luthier.v1.judge_pb2 import Judge, JudgeResult
from luthier.v1.model_pb2 import Model
from luthier.worker.v1.task_pb2 import Asking

MAX_JUDGES = 4
MAX_NEW_TOKENS = 8192
DEFAULT_NEW_TOKENS = 512
DEFAULT_SCALE = (1, 5)
DEFAULT_TIMEOUT_SECONDS = 60.0
DEFAULT_CALLS = 10_000
MAX_CALLS = 1_000_000
_MAX_TIMEOUT_SECONDS = 600.0
_MAX_CRITERIA_CHARACTERS = 4000
JUDGE_LIMITS: LimitTable = {
    "judges": count(MAX_JUDGES, "judges"),
    "judges[].judge_id": demanded(ID_LIMIT),
    "judges[].criteria": demanded(characters(_MAX_CRITERIA_CHARACTERS)),
    "judges[].max_new_tokens": demanded(whole(1, MAX_NEW_TOKENS)),
    "judges[].endpoint.url": demanded(characters(2000)),
    "judges[].endpoint.model": demanded(characters(200)),
    "judges[].endpoint.key": characters(1000),
    "judges[].endpoint.timeout_seconds": positive(_MAX_TIMEOUT_SECONDS),
    "judges[].endpoint.max_calls": demanded(whole(1, MAX_CALLS)),
    "judges[].rubric.least": whole(0, 99),
    "judges[].rubric.most": demanded(whole(1, 100)),
}
_ESTIMATE: LimitTable = {"value": ANY, "lower": ANY, "upper": ANY, "count": ANY}
JUDGE_RESULT_LIMITS: LimitTable = {
    "judge_id": demanded(ID_LIMIT),
    "num_asked": ANY,
    "num_errors": ANY,
    "errors": count(16, "reasons"),
    "errors[].reason": TEXT,
    "errors[].count": ANY,
    "errors[].first_message": TEXT,
    "num_repeated_calls": ANY,
    **under("agreement", _ESTIMATE),
    **under("position_bias", _ESTIMATE),
    "num_calls": ANY,
    "num_prompt_tokens": ANY,
    "num_generated_tokens": ANY,
    "pairs": count(15, "pairs"),
    "pairs[].arm_id": demanded(ID_LIMIT),
    "pairs[].rival_arm_id": demanded(ID_LIMIT),
    "pairs[].num_wins": ANY,
    "pairs[].num_ties": ANY,
    "pairs[].num_losses": ANY,
    "pairs[].num_contradictions": ANY,
    "pairs[].num_errors": ANY,
}
"""What a worker may say of a judge."""


def resolve_judges(filled: Evaluation) -> None:
    """Fill in, in place, what the judges of a new evaluation do not say and no model has to be known for."""
    for judge in filled.judges:
        judge.max_new_tokens = judge.max_new_tokens or DEFAULT_NEW_TOKENS
        if judge.HasField("endpoint"):
            judge.endpoint.timeout_seconds = judge.endpoint.timeout_seconds or DEFAULT_TIMEOUT_SECONDS
            judge.endpoint.max_calls = judge.endpoint.max_calls or DEFAULT_CALLS
        if judge.HasField("rubric"):
            least, most = DEFAULT_SCALE
            if not judge.rubric.most:
                judge.rubric.least = judge.rubric.least or least
                judge.rubric.most = most


def scores_of_judges(evaluation: Evaluation) -> list[str]:
    """Return the scores that the judges give."""
    return [f"{JUDGED}{judge.judge_id}" for judge in evaluation.judges]


def judge_violations(evaluation: Evaluation) -> Iterator[FieldViolation]:
    """Yield what is wrong with judges of a resolved evaluation, as far as no model has to be known for that."""
    for judge_id, times in Counter(judge.judge_id for judge in evaluation.judges).items():
        if times > 1:
            description = f"judge_id must be unique, got {judge_id!r} {times} times"
            yield FieldViolation(field="evaluation.judges", description=description)
    arms = [arm.arm_id for arm in evaluation.arms]
    for index, judge in enumerate(evaluation.judges):
        field = f"evaluation.judges[{index}]"
        yield from _choices(judge, field)
        if judge.HasField("pairwise"):
            yield from _of_pairs(judge.pairwise.arm_id, arms, f"{field}.pairwise")
        scale = judge.rubric
        if judge.HasField("rubric") and not scale.least < scale.most:
            description = f"must be above least, got {scale.most} and {scale.least}"
            yield FieldViolation(field=f"{field}.rubric.most", description=description)


def check_judge_references(evaluation: Evaluation) -> None:
    """Raise InvalidArgument for the first name of a model that is malformed."""
    for index, judge in enumerate(evaluation.judges):
        if judge.HasField("model"):
            WEIGHTS.parse(judge.model, field=f"evaluation.judges[{index}].model")


def judging_arms(evaluation: Evaluation) -> list[EvaluationArm]:
    """Return the models that judge as arms that have the judges' ids: they are found and loaded as arms are."""
    return [
        EvaluationArm(arm_id=judge.judge_id, model=judge.model, base_model=judge.base_model)
        for judge in evaluation.judges
        if judge.HasField("model")
    ]


def judge_field(evaluation: Evaluation, judge_id: str) -> str:
    """Return the path of a judge's model in a request."""
    index = [judge.judge_id for judge in evaluation.judges].index(judge_id)
    return f"evaluation.judges[{index}].model"


def judge_askings(evaluation: Evaluation, models: Mapping[str, Model], today: date) -> list[Asking]:
    """Return how each model that judges is asked: as it was taught, else as its base says.

    Raises InvalidArgument CHAT_TEMPLATE_MISSING where it cannot be asked in turns.
    """
    found = []
    for arm in judging_arms(evaluation):
        model = models[arm.model]
        base = models[base_name(model)]
        asking = as_taught(model, base, today)
        if not (asking.chat_template or base.has_chat_template):
            description = (
                f"must be a model with a chat template, as judges are asked in turns, got {arm.model!r}"
            )
            field = judge_field(evaluation, arm.arm_id)
            raise InvalidArgument.of_fields(
                FieldViolation(field=field, description=description, reason=Reason.CHAT_TEMPLATE_MISSING)
            )
        found.append(asking)
    return found


def pin_judges(filled: Evaluation, models: Mapping[str, Model]) -> None:
    """Say, in place, below which models a new evaluation's judges stand, and which arm each pairwise judge is about."""
    for judge in filled.judges:
        if judge.HasField("model"):
            judge.base_model = base_name(models[judge.model])
        if judge.HasField("pairwise") and not judge.pairwise.arm_id:
            judge.pairwise.arm_id = filled.candidate_arm_id or filled.arms[-1].arm_id


def require_calls(evaluation: Evaluation, num_records: int) -> None:
    """Raise InvalidArgument where an endpoint may be called less often than it would be asked about so many records."""
    num_arms = len(evaluation.arms)
    for index, judge in enumerate(evaluation.judges):
        each, most = judgements_a_record(judge, num_arms), judge.endpoint.max_calls
        if judge.HasField("endpoint") and each * num_records > most:
            description = (
                f"must be at least {each * num_records:,}, a call for each judgement: {each} of each of "
                f"{num_records:,} records; got {most:,}, for which evaluation.max_records must be at most "
                f"{most // each:,}"
            )
            raise InvalidArgument.of_fields(
                FieldViolation(
                    field=f"evaluation.judges[{index}].endpoint.max_calls", description=description
                )
            )


def require_judges(evaluation: Evaluation, found: Iterable[JudgeResult]) -> None:
    """Raise InvalidArgument unless there is a result of each judge, in their order."""
    wanted = [judge.judge_id for judge in evaluation.judges]
    got = [one.judge_id for one in found]
    if got != wanted:
        description = f"must be of {', '.join(wanted) or 'none'}, got {', '.join(got) or 'none'}"
        raise InvalidArgument.of_fields(FieldViolation(field="judge_results", description=description))


def _choices(judge: Judge, field: str) -> Iterator[FieldViolation]:
    for oneof in ("asked", "manner"):
        if judge.WhichOneof(oneof) is None:
            names = " and ".join(one.name for one in Judge.DESCRIPTOR.oneofs_by_name[oneof].fields)
            description = f"must be one of {names}, got none"
            yield FieldViolation(field=field, description=description, reason=Reason.FIELD_REQUIRED)
    if judge.WhichOneof("asked") == "model" and not judge.model:
        yield FieldViolation(
            field=f"{field}.model", description="must name a model, got nothing", reason=Reason.FIELD_REQUIRED
        )


def _of_pairs(arm_id: str, arms: list[str], field: str) -> Iterator[FieldViolation]:
    if len(arms) < 2:
        description = f"must be unset where there are no two arms to compare, got {', '.join(arms) or 'none'}"
        yield FieldViolation(field=field, description=description)
    elif arm_id and arm_id not in arms:
        description = f"must be one of the arms {', '.join(arms)}, got {arm_id!r}"
        yield FieldViolation(field=f"{field}.arm_id", description=description)
