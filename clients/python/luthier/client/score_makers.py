"""Who gave a score: judges, graders and reward models of one name may be others in another evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from luthier.v1.evaluation_pb2 import Evaluation
from luthier.v1.grader_pb2 import Grader
from luthier.v1.judge_pb2 import Judge

_JUDGE, _GRADER, _REWARD = "judge.", "grader.", "reward"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Maker:
    """What gives a score, as far as its values depend on it. `digests` are those of the models that it names."""

    message: Judge | Grader | str
    digests: tuple[str, ...]


def why_apart(score: str, one: Evaluation, other: Evaluation) -> str:
    """Return why the values that two evaluations have by a score cannot be held against each other; empty: they can."""
    if any(judge.HasField("pairwise") for each in (one, other) for judge in _judges(each, score)):
        return "a judge of pairs says how an arm stands to the other arms of its evaluation, not how good its answer is"
    if _maker(one, score) == _maker(other, score):
        return ""
    kind = "judge" if score.startswith(_JUDGE) else "grader" if score.startswith(_GRADER) else "reward model"
    return f"its {kind} is not the same in both"


def _maker(evaluation: Evaluation, score: str) -> _Maker | None:
    """Return who gave a score; None of one that has no maker, or none that the evaluation says."""
    digests = evaluation.model_digests

    def made(message: Judge | Grader | str, *models: str) -> _Maker:
        return _Maker(message=message, digests=tuple(digests.get(model, "") for model in models))

    for judge in _judges(evaluation, score):
        judging = Judge()
        judging.CopyFrom(judge)
        if judging.HasField("endpoint"):
            judging.endpoint.ClearField("key")
            judging.endpoint.ClearField("timeout_seconds")
            judging.endpoint.ClearField("max_calls")
        return made(judging, judge.model, judge.base_model)
    for grader in evaluation.graders:
        if score == f"{_GRADER}{grader.name}":
            grading = Grader()
            grading.CopyFrom(grader)
            return made(grading, *_prepared(grading))
    if score == _REWARD:
        return made(evaluation.reward_model, evaluation.reward_model)
    return None


def _judges(evaluation: Evaluation, score: str) -> list[Judge]:
    return [judge for judge in evaluation.judges if score == f"{_JUDGE}{judge.judge_id}"]


def _prepared(grader: Grader) -> Iterator[str]:
    """Clear, in place, what no value of a grader depends on, and yield the models that it names, in order."""
    if grader.HasField("remote"):
        grader.remote.ClearField("timeout_seconds")
        grader.remote.ClearField("max_batch_size")
    if grader.HasField("reward_model"):
        yield grader.reward_model.model
    for _, inner in sorted(grader.multi.graders.items()):
        yield from _prepared(inner)
