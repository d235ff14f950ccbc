"""The process of a service. `process_*` are the names of Prometheus's client libraries, and read from /proc."""

from luthier.runtime.metric import Metric

BUILD = Metric(
    name="luthier_build_info",
    kind="gauge",
    help="Always 1; its label is the version of the code.",
    question="Which version runs, and since when?",
    labels=("version",),
)
LAG = Metric(
    name="luthier_event_loop_lag_seconds",
    kind="histogram",
    help="How much later than due the event loop ran a timer, four times a second.",
    question="Does something keep the service from answering anybody?",
    unit="seconds",
    buckets=(0.001, 0.005, 0.02, 0.1, 0.5, 2.0),
    bound="9",
)
CPU = Metric(
    name="process_cpu_seconds_total",
    kind="counter",
    help="Total user and system CPU time spent in seconds.",
    question="How busy is the process? A service is one thread of Python: near 1 a second it is full.",
    unit="seconds",
)
RESIDENT = Metric(
    name="process_resident_memory_bytes",
    kind="gauge",
    help="Resident memory size in bytes.",
    question="Does its memory grow?",
    unit="bytes",
)
VIRTUAL = Metric(
    name="process_virtual_memory_bytes",
    kind="gauge",
    help="Virtual memory size in bytes.",
    question="Does its address space grow?",
    unit="bytes",
)
STARTED = Metric(
    name="process_start_time_seconds",
    kind="gauge",
    help="Start time of the process since unix epoch in seconds.",
    question="When did it start, and does it restart?",
    unit="timestamp",
)
DESCRIPTORS = Metric(
    name="process_open_fds",
    kind="gauge",
    help="Number of open file descriptors.",
    question="Do connections or files leak?",
)
MOST_DESCRIPTORS = Metric(
    name="process_max_fds",
    kind="gauge",
    help="Maximum number of open file descriptors.",
    question="How many more may it open?",
)
