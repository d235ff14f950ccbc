"""What /metrics shows of a queue: what waits, since when and why, and who is there to do it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from luthier.errors import Reason
from luthier.runtime.catalogue import queue, workers
from luthier.runtime.metric import largest
from luthier.storage.database import Database
from luthier.work.fitting import failure_of
from luthier.work.limits import PROJECT_SLOTS, kinds_with_room
from luthier.work.metrics import WorkMetrics
from luthier.work.repository import StandingGroup, Tasks
from luthier.work.requirements import Requirements
from luthier.work.tasks import TaskKind, TaskState
from luthier.work.worker_figures import CHILD_FAILURES
from luthier.work.workers import Worker, Workers

TURN = "TURN"
"""A worker that can do it has room for it: it is about to be handed out."""
BUSY = "BUSY"
"""All workers that can do it hold as much of its kind as they take."""
NO_WORKER = "NO_WORKER"
"""No worker takes its kind."""
PUT_OFF = "PUT_OFF"
"""It is kept back for a while: an attempt was lost, or could not be handed out."""
REASONS = (TURN, BUSY, NO_WORKER, str(Reason.NO_FITTING_WORKER), PUT_OFF, str(Reason.DISK_FULL))
_Held = Mapping[str, Sequence[tuple[TaskKind, str]]]
"""What each holder of leases has: the kind and the project of each task."""
_Idle = Mapping[TaskKind, Sequence[Worker]]
"""Who has room for a task of a kind."""
_UNFINISHED = (TaskState.QUEUED, TaskState.LEASED, TaskState.PAUSED)


class QueueFigures:
    """Looks at the queue and at its workers, and shows what it finds."""

    def __init__(self, database: Database, present: Workers, metrics: WorkMetrics) -> None:
        self._database = database
        self._workers = present
        self._metrics = metrics
        self._tasks = Tasks()

    async def look(self) -> None:
        """Show how things stand."""
        async with self._database.reading() as connection:
            groups = await self._tasks.standing(connection)
            held = await self._tasks.held_by(connection)
        self._show_tasks(groups)
        present = self._workers.present()
        idle = _with_room(present, held)
        self._show_waiting([group for group in groups if group.state is TaskState.QUEUED], present, idle)
        self._show_workers(present, idle, held)

    def _show_tasks(self, groups: Sequence[StandingGroup]) -> None:
        counts: Counter[tuple[str, str]] = Counter()
        oldest: defaultdict[str, dict[str, float]] = defaultdict(dict)
        for group in groups:
            counts[group.kind.value, group.state.value] += group.number
            if group.state is TaskState.QUEUED:
                before = oldest[group.kind.value].get(group.project, 0.0)
                oldest[group.kind.value][group.project] = max(before, group.oldest_seconds)
        keys = [(kind.value, state.value) for kind in self._metrics.kinds for state in _UNFINISHED]
        self._metrics.shown.show(queue.TASKS, ((key, counts[key]) for key in keys))
        self._metrics.shown.show(
            queue.OLDEST,
            (
                ((kind, project), seconds)
                for kind, projects in oldest.items()
                for project, seconds in largest(projects, queue.MOST_PROJECTS).items()
            ),
        )

    def _show_waiting(self, queued: Sequence[StandingGroup], present: Sequence[Worker], idle: _Idle) -> None:
        counts: Counter[tuple[str, str]] = Counter()
        has_room = self._database.disk.has_room()
        for group in queued:
            why = _why(group.kind, group.required, present, idle.get(group.kind, ()), has_room=has_room)
            counts[group.kind.value, PUT_OFF] += group.num_put_off
            counts[group.kind.value, why] += group.number - group.num_put_off
        keys = [(kind.value, reason) for kind in self._metrics.kinds for reason in REASONS]
        self._metrics.shown.show(queue.WAITING, ((key, counts[key]) for key in keys))

    def _show_workers(self, present: Sequence[Worker], idle: _Idle, held: _Held) -> None:
        shown = self._metrics.shown
        able = Counter(kind for one in present for kind in one.kinds)
        shown.show(workers.ABLE, [((kind.value,), able[kind]) for kind in self._metrics.kinds])
        free = [((kind.value,), len(idle.get(kind, ()))) for kind in self._metrics.kinds]
        shown.show(workers.IDLE, free)
        named = sorted(present, key=lambda worker: worker.worker_id)[: workers.MOST_WORKERS]
        shown.show(workers.INFO, ((_about(one), 1) for one in named))
        shown.show(workers.TASKS, (((one.worker_id,), len(held.get(one.holder, ()))) for one in named))
        has = [((one.worker_id,), one.equipment) for one in named]
        shown.show(workers.DEVICES, ((key, one.num_devices) for key, one in has if one.num_devices))
        shown.show(workers.CAPACITY, ((key, one.memory_bytes) for key, one in has if one.memory_bytes))
        self._show_told([one.worker_id for one in named])

    def _show_told(self, names: Sequence[str]) -> None:
        """Show what workers measured of themselves."""
        shown = self._metrics.shown
        told = [((name,), figures) for name in names if (figures := self._workers.figures(name)) is not None]
        shown.show(workers.RESIDENT, ((key, one.resident_bytes) for key, one in told if one.resident_bytes))
        shown.show(
            workers.AVAILABLE, ((key, one.available_bytes) for key, one in told if one.available_bytes)
        )
        shown.show(workers.CHILDREN, ((key, one.num_children) for key, one in told))
        shown.show(workers.CHILD_STARTS, ((key, one.num_child_starts) for key, one in told))
        failures = (
            ((*key, reason), one.num_child_failures.get(reason, 0))
            for key, one in told
            for reason in CHILD_FAILURES
        )
        shown.show(workers.CHILD_ENDS, failures)


def _with_room(present: Sequence[Worker], held: _Held) -> _Idle:
    """Return who may take one more task of a kind, beside what it holds, of any project.

    A slot that is kept from a project is no room for all.
    """
    idle: defaultdict[TaskKind, list[Worker]] = defaultdict(list)
    for worker in present:
        has = held.get(worker.holder, ())
        kept = {kind for (kind, _), number in Counter(has).items() if number >= PROJECT_SLOTS[kind]}
        for kind in kinds_with_room(worker.kinds, [kind for kind, _ in has]):
            if kind not in kept:
                idle[kind].append(worker)
    return idle


def _about(worker: Worker) -> tuple[str, str, str, str, str]:
    """Return the labels of `workers.INFO`."""
    kinds = ",".join(sorted(kind.value for kind in worker.kinds))
    return worker.worker_id, kinds, worker.equipment.device, worker.equipment.device_name, worker.version


def _why(
    kind: TaskKind,
    required: Requirements,
    present: Sequence[Worker],
    idle: Sequence[Worker],
    *,
    has_room: bool,
) -> str:
    """Return why a task waits that is not put off: one of `REASONS`."""
    failure = failure_of(kind, required, present)
    if failure is not None:
        return NO_WORKER if failure.metadata["requirement"] == "kind" else str(Reason.NO_FITTING_WORKER)
    if not has_room:
        return str(Reason.DISK_FULL)
    return TURN if failure_of(kind, required, idle) is None else BUSY
