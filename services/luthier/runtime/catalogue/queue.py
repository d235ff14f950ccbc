"""Tasks: what waits and why, how long, and what became of attempts."""

from luthier.runtime.metric import Metric

MOST_PROJECTS = 20
"""Projects that have a series of their own, those that wait longest; the others are one."""
_KINDS = "one a kind of task"

TASKS = Metric(
    name="luthier_tasks",
    kind="gauge",
    help="Unfinished tasks: QUEUED, LEASED, or PAUSED on request, which is no waiting for a worker.",
    question="How much waits, how much is worked on?",
    labels=("kind", "state"),
    bound="three a kind of task",
)
OLDEST = Metric(
    name="luthier_task_oldest_waiting_seconds",
    kind="gauge",
    help="Time that the task has waited that was queued longest ago; no series where none waits.",
    question="Is anything stuck, and whose?",
    labels=("kind", "project"),
    unit="seconds",
    bound=f"{MOST_PROJECTS} projects a kind, the others are OTHER",
)
WAITING = Metric(
    name="luthier_tasks_waiting",
    kind="gauge",
    help="Queued tasks by why they wait: TURN, BUSY, NO_WORKER, NO_FITTING_WORKER, PUT_OFF, DISK_FULL.",
    question="Why does nothing begin?",
    labels=("kind", "reason"),
    bound="six a kind of task",
)
QUEUE_WAIT = Metric(
    name="luthier_task_queue_wait_seconds",
    kind="histogram",
    help="Time from queueing a task to its claim.",
    question="How long do people wait for a worker?",
    labels=("kind",),
    unit="seconds",
    buckets=(0.01, 0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600),
    bound="13 a kind of task",
)
ATTEMPTS = Metric(
    name="luthier_task_attempts_total",
    kind="counter",
    help="Attempts that ended, by how and why.",
    question="What do attempts end of: crashes, memory, lost workers?",
    labels=("kind", "outcome", "reason"),
    bound="one a kind, outcome and reason that was met; reasons that are none of ours are OTHER",
)
ENDED = Metric(
    name="luthier_tasks_ended_total",
    kind="counter",
    help="Tasks that ended for good. fault: service, where it failed for no fault of who asked for it.",
    question="What share of jobs ends without a fault of the service?",
    labels=("kind", "outcome", "fault", "reason"),
    bound="one a kind, outcome and reason that was met",
)
LEASES_EXPIRED = Metric(
    name="luthier_lease_expired_total",
    kind="counter",
    help="Leases that ran out because their holder was silent.",
    question="Do workers die or hang?",
)
SET_ASIDE = Metric(
    name="luthier_task_set_aside_total",
    kind="counter",
    help="Tasks failed because their claim fails.",
    question="Is there a task that nobody can even be given?",
    labels=("kind",),
    bound=_KINDS,
)
