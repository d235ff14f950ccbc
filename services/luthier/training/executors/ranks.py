"""What the driver of several ranks orders of each, and on how many ranks a worker trains a job. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from luthier.errors import InvalidArgument, Reason, Unavailable
from luthier.training.recipe_settings import ranks_of
from luthier.training.worker.order import TrainOrder
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob

EXECUTORS = ("inline", "torchrun", "ray")


@dataclass(frozen=True, slots=True, kw_only=True)
class RankOrder:
    """The part of one rank in a training.

    Attributes:
        order: the training, with a folder and rows of the rank's own.
        rank: its place, from 0.
        num_ranks: how many there are.
        meeting: a folder that all share: where they find one another, and show what they do.
        num_threads: torch's, of this rank.
    """

    order: TrainOrder
    rank: int
    num_ranks: int
    meeting: Path
    num_threads: int

    @property
    def pulse(self) -> Path:
        """Where the rank shows its pulse."""
        return pulse_path(self.meeting, self.rank)


def pulse_path(meeting: Path, rank: int) -> Path:
    """Return where a rank shows its pulse."""
    return meeting / f"pulse-{rank}"


def ranks_for(job: FineTuningJob, num_ranks: int, executor: str = "torchrun") -> int:
    """Return on how many of a worker's ranks a job is trained; `executor` is one that has as many as it takes.

    Raises:
        Unavailable: TOO_FEW_RANKS; another worker may have as many as the job takes.
    """
    least, most = ranks_of(job)
    if num_ranks < least:
        raise Unavailable(
            f"the job takes at least {least} ranks, this worker has {num_ranks}: start one with --executor {executor} "
            f"--ranks {least}, or lower ranks.min_ranks",
            reason=Reason.TOO_FEW_RANKS,
            metadata={"min_ranks": str(least), "ranks": str(num_ranks)},
        )
    return min(num_ranks, most)


def require_choice(executor: str, num_ranks: int) -> None:
    """Check what a worker is told of its executor, as far as no device has to be known.

    Raises:
        InvalidArgument: there is no such executor, or it has not so many ranks.
    """
    if executor not in EXECUTORS:
        raise InvalidArgument(
            f"a worker's executor (LUTHIER_WORKER_EXECUTOR) must be {', '.join(EXECUTORS[:-1])} or {EXECUTORS[-1]}, "
            f"got {executor!r}"
        )
    if num_ranks < 1:
        raise InvalidArgument(f"a worker's ranks (LUTHIER_WORKER_RANKS) must be at least 1, got {num_ranks}")
    if executor == "inline" and num_ranks > 1:
        raise InvalidArgument(
            f"a worker's ranks (LUTHIER_WORKER_RANKS) must be 1 with the executor inline, got {num_ranks}: choose "
            "torchrun or ray for several"
        )


def require_devices(kind: str, num_devices: int, name: str, num_ranks: int, chosen: str = "cuda:0") -> None:
    """Check that each of several ranks of this machine has a device of its own: a GPU, or a processor.

    Args:
        kind: cpu or cuda, as torch calls them.
        num_devices: how many there are of it.
        name: the device as it was asked for.
        num_ranks: how many ranks there are to be.
        chosen: the GPU that was found to work; rank r takes the one with number r.

    Raises:
        InvalidArgument: there are fewer, or one of them was asked for, or the first does not work; the message says
            what would be right.
    """
    if num_ranks == 1:
        return
    if kind == "cuda" and name == "auto" and chosen != "cuda:0":
        raise InvalidArgument(
            f"each of {num_ranks} ranks (LUTHIER_WORKER_RANKS) takes a GPU of its own, from the first on, which does "
            f"not work: {chosen} does; name those that work in CUDA_VISIBLE_DEVICES"
        )
    if kind == "cuda" and name not in ("auto", "cuda", "rocm"):
        raise InvalidArgument(
            f"a worker's device (LUTHIER_WORKER_DEVICE) must be auto, cuda or rocm with {num_ranks} ranks, each of "
            f"which takes a GPU of its own, got {name!r}: say cuda, and name those that they may use in "
            "CUDA_VISIBLE_DEVICES where these are not the first"
        )
    if num_ranks > num_devices:
        what = "GPUs" if kind == "cuda" else "processors"
        raise InvalidArgument(
            f"a worker's ranks (LUTHIER_WORKER_RANKS) must be at most the {num_devices} {what} that it may use, "
            f"got {num_ranks}"
        )
