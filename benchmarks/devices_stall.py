"""What a checkpoint costs the loop that trains: a job of all weights through real services. For `devices.py`.

A Data and a Training service, their workers and the worker's child are processes of their own; checkpoints of 500 MB
are written by the child, hashed, sent and committed by the worker. Times are those at which the service recorded the
events of the job, so that both kinds of steps, those behind a checkpoint and those that nothing is stored beside, are
of one run and in turns.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from gpu_check import Sizes, make_model
from gpu_check_job import prepare
from service_processes import WAIT_SECONDS, running

from luthier.v1.event_pb2 import Event
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob, FullConfig, Hyperparameters

_SKIPPED_STEPS = 2
"""The first ones find kernels and threads cold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StallSize:
    """How large the model of the job is, and how long the job.

    Attributes:
        model: its sizes.
        batch_tokens: of a step.
        interval: steps from one checkpoint to the next.
        num_checkpoints: behind which there are steps; one more ends the job.
    """

    model: Sizes
    batch_tokens: int
    interval: int
    num_checkpoints: int


# 35.5 million weights, of each of which a checkpoint has 14 bytes; the step is a job's default.
_MODEL = Sizes(hidden=512, inner=1408, layers=12)
SIZE = StallSize(model=_MODEL, batch_tokens=4096, interval=6, num_checkpoints=6)
FAST = StallSize(
    model=Sizes(hidden=128, inner=256, layers=4), batch_tokens=4096, interval=8, num_checkpoints=2
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """When the service recorded what of a job, in seconds.

    Attributes:
        steps: the end of each step, by its number.
        commits: each checkpoint, by its step.
    """

    steps: Mapping[int, float]
    commits: Mapping[int, float]


def measured(folder: Path, size: StallSize) -> dict[str, Any]:
    """Return what checkpoints cost, in seconds and in steps, and how large they are."""
    model = make_model(folder / "model", size.model)
    with running(folder / "home", "cpu", ("data", "training")) as stack, stack.client() as client:
        try:
            made = client.jobs.create(_job(prepare(stack, client, model), size), job_id="stall")
            seen = _seen(client.jobs.watch(made.name))
            client.jobs.wait("stall", timeout_seconds=WAIT_SECONDS)
            size_bytes = max(one.size_bytes for one in client.jobs.checkpoints("stall"))
        except Exception as error:
            raise RuntimeError(f"the job of the stall failed: {error}\n{stack.logs()}") from error
    return {"checkpoint_bytes": size_bytes, **costs(seen)}


def _seen(events: Iterable[Event]) -> Seen:
    steps: dict[int, float] = {}
    commits: dict[int, float] = {}
    kept = {"metrics": steps, "checkpoint": commits}
    for event in events:
        moments = kept.get(event.WhichOneof("payload") or "")
        if moments is not None:
            moments[event.step] = event.event_time.ToNanoseconds() / 1e9
    return Seen(steps=steps, commits=commits)


def _job(rendering: str, size: StallSize) -> FineTuningJob:
    return FineTuningJob(
        base_model="base",
        rendering=rendering,
        full=FullConfig(),
        hyperparameters=Hyperparameters(
            # One step more: what the last checkpoint but one costs shows in the step behind it.
            max_steps=size.interval * size.num_checkpoints + 1,
            num_epochs=1000,
            batch_tokens=size.batch_tokens,
            learning_rate=1e-5,
        ),
        checkpoint_interval_steps=size.interval,
        max_checkpoints=1,
    )


def costs(seen: Seen) -> dict[str, Any]:
    """Return the medians of what checkpoints cost.

    `stall_steps` is how much longer it was to the end of the step behind a checkpoint than a quiet step takes, in such
    steps: the copy, the wait for the checkpoint before, and what storing takes from that step. `excess_steps` adds the
    same of all steps until the checkpoint was committed: all that storing it took from the loop. A step is quiet when
    nothing was stored while it was made.

    Raises:
        ValueError: no step was quiet, or there was no checkpoint with a step behind it.
    """
    spans = {last: (seen.steps[first], seen.steps[last]) for first, last in pairwise(sorted(seen.steps))}
    storing = [(seen.steps[step], end) for step, end in seen.commits.items()]
    quiet = [
        end - begin
        for step, (begin, end) in spans.items()
        if step > _SKIPPED_STEPS and not any(begin < over and since < end for since, over in storing)
    ]
    behind = [step for step in seen.commits if step + 1 in spans]
    if not quiet or not behind:
        raise ValueError(f"there must be quiet steps and steps behind a checkpoint, got {seen}")
    usual = statistics.median(quiet)
    stalls = [_length(spans[step + 1]) - usual for step in behind]
    excesses = [
        sum(_length(span) - usual for span in _during(spans, seen.steps[step], seen.commits[step]))
        for step in behind
    ]
    return {
        "step_seconds": usual,
        "quiet_steps": len(quiet),
        "checkpoints": len(behind),
        "stall_seconds": statistics.median(stalls),
        "stall_steps": statistics.median(stalls) / usual,
        "largest_stall_steps": max(stalls) / usual,
        "excess_steps": statistics.median(excesses) / usual,
        "store_seconds": statistics.median(seen.commits[step] - seen.steps[step] for step in behind),
    }


def _length(span: tuple[float, float]) -> float:
    return span[1] - span[0]


def _during(
    spans: Mapping[int, tuple[float, float]], since: float, until: float
) -> Sequence[tuple[float, float]]:
    """Return the steps that were made while a checkpoint was stored."""
    return [(begin, end) for begin, end in spans.values() if begin < until and since < end]
