"""Whether a worker that is there has the memory that a job takes: plans say so, and hopeless jobs are refused.

Nothing is said where no worker is there that the job could be given to, or one of them does not tell its memory: who
comes later may have more, and a job waits for a worker in any case (NO_FITTING_WORKER).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from luthier.errors import FailedPrecondition, Reason
from luthier.training.fitting import Fit, Rows, fits_of, what_would
from luthier.training.jobs.reinforcement import answer_tokens
from luthier.training.jobs.split_counts import num_idle, statistics_of
from luthier.training.recipe_settings import is_divided, ranks_of
from luthier.training.recipes.footprint import Place, Trained
from luthier.v1.dataset_pb2 import SPLIT_TRAIN, SPLIT_VALIDATION
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob
from luthier.v1.rendering_pb2 import Rendering
from luthier.work.fitting import Equipped
from luthier.work.requirements import Equipment, read_requirements
from luthier.work.tasks import TaskKind

_NAMED = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class _Short:
    """That a job fits none of some workers: the least that it takes, and what would fit the one with most memory."""

    fit: Fit
    would: str
    workers: str


def room_warnings(
    workers: Sequence[Equipped], job: FineTuningJob, trained: Trained, rows: Rows
) -> Iterator[str]:
    """Yield that none of the workers that are there has the memory, with a tenth to spare, that a counted job takes."""
    short = _short(workers, job, trained, rows, lambda fit: fit.fits)
    if short is not None:
        yield (
            f"no training worker that is there has the memory, with a tenth to spare: {short.fit.words}; "
            f"{short.would}; there are: {short.workers}"
        )


def require_worker_with_room(
    workers: Sequence[Equipped], job: FineTuningJob, trained: Trained, rows: Rows
) -> None:
    """Refuse a job that each worker that is there would give up before its first step.

    `rows` may be of the least that is known of them: what they really take is then only more.

    Raises:
        FailedPrecondition: DOES_NOT_FIT, with what would, and what the workers have.
    """
    short = _short(workers, job, trained, rows, lambda fit: not fit.is_beyond)
    if short is None:
        return
    raise FailedPrecondition(
        f"a job must fit into the memory of a training worker that is there: at the least {short.fit.words}; "
        f"{short.would}, or start a worker with more; there are: {short.workers}",
        reason=Reason.DOES_NOT_FIT,
        metadata={"peak_bytes": str(short.fit.footprint.peak), "memory_bytes": str(short.fit.limit)},
    )


def least_rows(job: FineTuningJob, renderings: Sequence[Rendering]) -> Rows:
    """Return what is sure of a job's rows by the statistics of its renderings, before any is counted."""
    known = [statistics_of(rendering, SPLIT_TRAIN) for rendering in renderings]
    # The longest row of a split with idle rows may be one of them, which is left out.
    longest = max(
        (split.longest_unit_tokens or split.tokens.maximum for split in known if not num_idle(split)),
        default=1,
    )
    held = sum(
        statistics_of(rendering, split).tokens.sum
        for rendering in renderings
        for split in (SPLIT_TRAIN, SPLIT_VALIDATION)
    )
    longest = max(1, longest) + answer_tokens(job)
    return Rows(longest=longest, largest=longest, scored_share=0.0, num_tokens=held)


def _short(
    workers: Sequence[Equipped],
    job: FineTuningJob,
    trained: Trained,
    rows: Rows,
    is_enough: Callable[[Fit], bool],
) -> _Short | None:
    required = read_requirements(job.requirements, ranks_of(job)[0])
    able = [one for one in workers if TaskKind.TRAIN in one.kinds and one.equipment.meets(required)]
    if not able or not all(one.equipment.memory_bytes for one in able):
        return None
    able.sort(key=lambda one: (-_limit(job, one.equipment), one.worker_id))
    for one in able:
        place, limit = _place(one.equipment), _limit(job, one.equipment)
        part, own = _part(job, trained, one.equipment), _own(job, rows, one.equipment)
        if any(is_enough(fit) for fit in fits_of(job, part, own, place, limit)):
            return None
    most = able[0].equipment
    place, limit = _place(most), _limit(job, most)
    part, own = _part(job, trained, most), _own(job, rows, most)
    *_, least = fits_of(job, part, own, place, limit)
    named = [f"{one.worker_id} {one.equipment}" for one in able[:_NAMED]]
    more = [f"{len(able) - _NAMED} more"] if len(able) > _NAMED else []
    would = what_would(job, part, own, place, limit)
    return _Short(fit=least, would=would, workers=", ".join([*named, *more]))


def _place(equipment: Equipment) -> Place:
    return "CPU" if equipment.device == "CPU" else "GPU"


def _ranks(job: FineTuningJob, equipment: Equipment) -> int:
    return min(equipment.ranks_met, ranks_of(job)[1])


def _limit(job: FineTuningJob, equipment: Equipment) -> int:
    """Return the bytes of a rank: each has a GPU of its own, those on a processor share the machine's memory."""
    shared_by = _ranks(job, equipment) if _place(equipment) == "CPU" else 1
    return equipment.memory_bytes // shared_by


def _part(job: FineTuningJob, trained: Trained, equipment: Equipment) -> Trained:
    """Return what each of a worker's ranks trains: of a model that they divide its part, the smaller the more."""
    return replace(trained, num_parts=_ranks(job, equipment)) if is_divided(job) else trained


def _own(job: FineTuningJob, rows: Rows, equipment: Equipment) -> Rows:
    return replace(rows, num_ranks=_ranks(job, equipment))
