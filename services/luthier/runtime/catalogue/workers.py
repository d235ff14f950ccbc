"""Workers, as they tell of themselves with their claims and heartbeats."""

from luthier.runtime.metric import Metric

MOST_WORKERS = 200
"""Workers that have series of their own, the first by name."""
_WORKERS = f"one a worker that is heard of, at most {MOST_WORKERS}"

UP = Metric(
    name="luthier_workers",
    kind="gauge",
    help="Workers heard of within a lease period.",
    question="How many workers are there?",
)
ABLE = Metric(
    name="luthier_workers_able",
    kind="gauge",
    help="Workers heard of that take tasks of a kind.",
    question="Is there anybody for this kind of work?",
    labels=("kind",),
    bound="one a kind of task",
)
IDLE = Metric(
    name="luthier_workers_idle",
    kind="gauge",
    help="Workers heard of that have room for a task of a kind, whatever they do of others.",
    question="Is there room for more work?",
    labels=("kind",),
    bound="one a kind of task",
)
INFO = Metric(
    name="luthier_worker_info",
    kind="gauge",
    help="Always 1; its labels say what the worker is. Kinds of tasks that it takes stand in one label, with commas.",
    question="Which workers are there, for what kinds of work, with what device and which version?",
    labels=("worker", "kinds", "device", "device_name", "version"),
    bound=_WORKERS,
)
TASKS = Metric(
    name="luthier_worker_tasks",
    kind="gauge",
    help="Tasks that the worker holds.",
    question="Which worker does what?",
    labels=("worker",),
    bound=_WORKERS,
)
DEVICES = Metric(
    name="luthier_worker_devices",
    kind="gauge",
    help="Devices that the worker computes on; no series where it does not say.",
    question="How many devices are there?",
    labels=("worker",),
    bound=_WORKERS,
)
CAPACITY = Metric(
    name="luthier_worker_memory_bytes",
    kind="gauge",
    help="Memory of one of its devices; no series where it does not say.",
    question="What could a job there take?",
    labels=("worker",),
    unit="bytes",
    bound=_WORKERS,
)
RESIDENT = Metric(
    name="luthier_worker_resident_bytes",
    kind="gauge",
    help="Memory that the worker and its children hold; pages that they share count in each.",
    question="What do its processes take of the machine?",
    labels=("worker",),
    unit="bytes",
    bound=_WORKERS,
)
AVAILABLE = Metric(
    name="luthier_worker_available_bytes",
    kind="gauge",
    help="Memory of the worker's machine that nobody needs just now.",
    question="Will the kernel end something soon?",
    labels=("worker",),
    unit="bytes",
    bound=_WORKERS,
)
CHILDREN = Metric(
    name="luthier_worker_children",
    kind="gauge",
    help="Children of the worker that are at work.",
    question="Does the worker compute?",
    labels=("worker",),
    bound=_WORKERS,
)
CHILD_STARTS = Metric(
    name="luthier_worker_child_starts_total",
    kind="counter",
    help="Children that the worker has given work.",
    question="How many pieces of work does a worker do?",
    labels=("worker",),
    bound=_WORKERS,
)
CHILD_ENDS = Metric(
    name="luthier_worker_child_failures_total",
    kind="counter",
    help="Children that ended before their work did, by reason; NURSERY: what they are forked from.",
    question="Which machine loses its processes, and why?",
    labels=("worker", "reason"),
    bound=f"four a worker that is heard of, at most {MOST_WORKERS} workers",
)
