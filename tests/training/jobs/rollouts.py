"""Reinforcement jobs on the bench, and what their workers hand in."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from luthier.v1.fine_tuning_job_pb2 import FineTuningJob, Hyperparameters, ReinforcementConfig
from luthier.v1.grader_pb2 import Grader, StringCheckGrader
from luthier.v1.rendering_pb2 import RENDERING_KIND_PROMPT
from luthier.v1.rollout_pb2 import Rollout
from luthier.work.row_file import write_rows
from luthier.work.tasks import Task
from luthier.worker.v1.task_pb2 import BlobFile
from luthier.worker.v1.worker_service_pb2 import CommitRolloutsRequest

GRADER = Grader(
    string_check=StringCheckGrader(
        input="{{sample.output_text}}",
        reference="{{item.completion}}",
        operation=StringCheckGrader.OPERATION_EQ,
    )
)


def reinforcement(**changes: Any) -> ReinforcementConfig:
    """A method that is whole, with short answers."""
    return ReinforcementConfig(**{"grader": GRADER, "max_new_tokens": 8, **changes})


async def create(bench: Any, job_id: str = "one", **changes: Any) -> FineTuningJob:
    """Create a reinforcement job on the bench's model, and prompts."""
    bench.add_rendering(kind=RENDERING_KIND_PROMPT)
    wanted = {"reinforcement": reinforcement(), "hyperparameters": Hyperparameters(batch_rows=2), **changes}
    job: FineTuningJob = await bench.create(job_id, **wanted)
    return job


def drawn(step: int, text: str = "drawn", count: int = 4) -> list[Rollout]:
    """What a step may draw, two answers to each prompt; the last one has no reward."""
    rollouts = [
        Rollout(
            step=step,
            group=number // 2,
            sample=number % 2,
            row=number // 2,
            output_text=f"{text} {number}",
            token_ids=[7, number],
            logprobs=[-0.1, -1.5],
            reward=number / 8,
            advantage=0.25 * (number % 2),
        )
        for number in range(count)
    ]
    rollouts[-1].error.code = 14
    rollouts[-1].error.message = "the grader was away"
    return rollouts


async def committed(bench: Any, task: Task, step: int, rollouts: Sequence[Rollout]) -> CommitRolloutsRequest:
    """Store rollouts and return the request that commits them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rollouts"
        write_rows(path, (one.SerializeToString(deterministic=True) for one in rollouts))
        blob = await bench.blobs.put_bytes(path.read_bytes())
    return CommitRolloutsRequest(
        task=task.task_id,
        epoch=task.epoch,
        step=step,
        file=BlobFile(path=f"rollouts/step-{step}", sha256=blob.digest, size_bytes=blob.size_bytes),
        num_rollouts=len(rollouts),
    )


async def commit(bench: Any, task: Task, step: int, rollouts: Sequence[Rollout] = ()) -> str:
    """Commit what a step drew; return the digest of its file."""
    request = await committed(bench, task, step, rollouts or drawn(step))
    await bench.queue.commit_rollouts(request)
    return str(request.file.sha256)
