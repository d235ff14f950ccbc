"""What an evaluation has that ended before it was scored: marked, so that nobody takes its answers for all of them."""

from __future__ import annotations

from collections.abc import Sequence

from luthier.client.events import state_of
from luthier.v1.evaluation_pb2 import Evaluation, Prediction

_EARLY = (Evaluation.STATE_CANCELLED, Evaluation.STATE_FAILED)


def early_end(evaluation: Evaluation) -> str:
    """Return how an evaluation ended that was not scored, e.g. `FAILED: out of memory`; empty of every other."""
    if evaluation.state not in _EARLY:
        return ""
    state = state_of(evaluation)
    return f"{state}: {evaluation.error.message}" if evaluation.HasField("error") else state


def partial_words(evaluation: Evaluation, predictions: Sequence[Prediction]) -> str:
    """Return how an evaluation ended early, and how much of it there is; empty of one that did not."""
    ended = early_end(evaluation)
    if not ended:
        return ""
    progress = evaluation.progress
    came = f"{progress.completed:,} of {progress.total:,} answers had come" if progress.total else ""
    counts = ", ".join(f"{arm.arm_id} {_kept(arm.arm_id, predictions)}" for arm in evaluation.arms)
    kept = f"kept are those to {len(predictions):,} records ({counts})" if predictions else "none are kept"
    told = f"{came}, {kept}" if came else f"Of its answers {kept}"
    return (
        f"{ended.rstrip('.')}. {told}. They are not scored, and there is no verdict: what was asked first need not be "
        "like the rest."
    )


def has_answers(evaluation: Evaluation) -> bool:
    """Whether there can be answers to read: an evaluation that ended before the first one has none."""
    return not early_end(evaluation) or evaluation.num_records > 0


def _kept(arm_id: str, predictions: Sequence[Prediction]) -> str:
    said = [answer for one in predictions for answer in one.answers if answer.arm_id == arm_id]
    errors = sum(answer.HasField("error") for answer in said)
    return f"{len(said):,} with {errors:,} error{'s' * (errors > 1)}" if errors else f"{len(said):,}"
