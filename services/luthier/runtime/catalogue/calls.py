"""Calls of the API and of the worker protocol. `grpc_server_*` are go-grpc-middleware's names and labels."""

from luthier.runtime.metric import Metric

_METHOD = ("grpc_type", "grpc_service", "grpc_method")
_METHODS = "one a method"
_SIZES = (256, 4096, 65536, 1 << 20, 4 << 20)

STARTED = Metric(
    name="grpc_server_started_total",
    kind="counter",
    help="Calls begun.",
    question="How many calls come in, by method?",
    labels=_METHOD,
    bound=_METHODS,
)
HANDLED = Metric(
    name="grpc_server_handled_total",
    kind="counter",
    help="Calls ended, by status code.",
    question="What share of calls fails, and with what?",
    labels=(*_METHOD, "grpc_code"),
    bound="one a method and code that was answered",
)
RECEIVED = Metric(
    name="grpc_server_msg_received_total",
    kind="counter",
    help="Messages received.",
    question="How many messages do callers stream in?",
    labels=_METHOD,
    bound=_METHODS,
)
SENT = Metric(
    name="grpc_server_msg_sent_total",
    kind="counter",
    help="Messages sent.",
    question="How many messages do callers read, watchers above all?",
    labels=_METHOD,
    bound=_METHODS,
)
SECONDS = Metric(
    name="grpc_server_handling_seconds",
    kind="histogram",
    help="Time from a unary call's beginning to its end; not of what is refused as it comes, which takes none. "
    "Streams: luthier_grpc_stream_seconds.",
    question="How long do callers wait for an answer?",
    labels=_METHOD,
    unit="seconds",
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
    bound="14 a unary method",
)
STREAM_SECONDS = Metric(
    name="luthier_grpc_stream_seconds",
    kind="histogram",
    help="Time from a streaming call's beginning to its end.",
    question="How long do watches, uploads and downloads last?",
    labels=_METHOD,
    unit="seconds",
    buckets=(0.1, 1.0, 10.0, 60.0, 600.0, 3600.0),
    bound="9 a streaming method",
)
IN_FLIGHT = Metric(
    name="luthier_grpc_in_flight",
    kind="gauge",
    help="Calls that have begun and not ended.",
    question="Who is connected: how many watch, upload and wait?",
    labels=_METHOD,
    bound=_METHODS,
)
FAILED = Metric(
    name="luthier_grpc_failed_total",
    kind="counter",
    help="Calls that ended with an error of ours, by its reason.",
    question="Why are calls refused?",
    labels=("grpc_service", "grpc_code", "reason"),
    bound="one a service, code and reason that was answered; reasons that are none of ours are OTHER",
)
RECEIVED_BYTES = Metric(
    name="luthier_grpc_received_bytes",
    kind="histogram",
    help="Sizes of messages received.",
    question="Are messages near their limit?",
    labels=("grpc_service", "grpc_type"),
    unit="bytes",
    buckets=_SIZES,
    bound="8 a service and kind of call",
)
SENT_BYTES = Metric(
    name="luthier_grpc_sent_bytes",
    kind="histogram",
    help="Sizes of messages sent.",
    question="Are answers near their limit?",
    labels=("grpc_service", "grpc_type"),
    unit="bytes",
    buckets=_SIZES,
    bound="8 a service and kind of call",
)
REFUSED = Metric(
    name="luthier_calls_refused_total",
    kind="counter",
    help="Calls refused with RESOURCE_EXHAUSTED; with a pool: at the door, because none of its slots was free.",
    question="Is the service overloaded, and who is turned away?",
    labels=("pool", "reason"),
    bound="one a pool, one a reason",
)
RUNNING = Metric(
    name="luthier_calls_running",
    kind="gauge",
    help="Calls that hold a slot.",
    question="How near is each pool to its limit?",
    labels=("pool",),
    bound="one a pool",
)
WAITING = Metric(
    name="luthier_calls_waiting",
    kind="gauge",
    help="Calls that wait for a slot.",
    question="Do calls wait before they begin?",
    labels=("pool",),
    bound="one a pool",
)
INTAKE = Metric(
    name="luthier_calls_intake_wait_seconds",
    kind="gauge",
    unit="seconds",
    help="How long a call waits inside gRPC before any stage sees it, measured by one of the service's own; 0 in calm.",
    question="Do calls wait where nobody can refuse them?",
)
