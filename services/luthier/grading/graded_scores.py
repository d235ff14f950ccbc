"""The scores that graders give: what values each has, read off its message."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from luthier.grading.metrics.scores import GRADED, Score, ScoreKind, score_named
from luthier.v1.grader_pb2 import Grader, ScoreRange

NameScore = Callable[[str], Score]
"""What a score of a name is; it raises ValueError where there is no such score."""
_ALWAYS = {
    "string_check": ScoreKind.BINARY,
    "number_match": ScoreKind.BINARY,
    "regex": ScoreKind.BINARY,
    "text_similarity": ScoreKind.FRACTION,
    "reward_model": ScoreKind.REAL,
}


def scores_of(graders: Iterable[Grader]) -> NameScore:
    """Return what says what a score is where graders give some; that of a metric is as `score_named` has it."""
    own = {f"{GRADED}{grader.name}": _score(grader) for grader in graders}

    def named(name: str) -> Score:
        return own.get(name) or score_named(name)

    return named


def _score(grader: Grader) -> Score:
    return replace(score_named(GRADED), name=f"{GRADED}{grader.name}", kind=_kind(grader))


def _kind(grader: Grader) -> ScoreKind:
    kind = grader.WhichOneof("kind")
    assert kind is not None, "a grader that passed the checks has a kind"
    if kind == "json_match":
        return ScoreKind.BINARY if grader.json_match.whole else ScoreKind.FRACTION
    if kind in ("multi", "remote"):
        message = getattr(grader, kind)
        is_share = not message.HasField("range") or _is_within_one(message.range)
        return ScoreKind.FRACTION if is_share else ScoreKind.REAL
    return _ALWAYS[kind]


def _is_within_one(limits: ScoreRange) -> bool:
    return limits.min >= 0 and limits.max <= 1
