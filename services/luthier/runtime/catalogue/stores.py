"""The database, the blobs and the disk of a service."""

from luthier.runtime.metric import Metric

_BUCKETS = (0.0005, 0.001, 0.0025, 0.01, 0.05, 0.25, 1.0, 5.0)
OPERATIONS = ("read", "write", "append", "commit", "delete", "look")
"""Of blobs: whole blobs in and out, pieces of an upload, its end, and whether or how large."""

QUERY_SECONDS = Metric(
    name="luthier_database_query_seconds",
    kind="histogram",
    help="Time of one statement in the database.",
    question="Is the database slow?",
    unit="seconds",
    buckets=_BUCKETS,
    bound="11",
)
COMMIT_SECONDS = Metric(
    name="luthier_database_commit_seconds",
    kind="histogram",
    help="Time to commit a transaction that writes.",
    question="Is the disk slow?",
    unit="seconds",
    buckets=_BUCKETS,
    bound="11",
)
WRITER_WAIT = Metric(
    name="luthier_database_writer_wait_seconds",
    kind="histogram",
    help="Time that a transaction that writes waited for the one before it.",
    question="Do writers stand in line?",
    unit="seconds",
    buckets=_BUCKETS,
    bound="11",
)
BLOB_SECONDS = Metric(
    name="luthier_blob_operation_seconds",
    kind="histogram",
    help="Time of operations on blobs in the store; of reading and writing, waiting for the other end left out.",
    question="Is the blob store slow?",
    labels=("operation",),
    unit="seconds",
    buckets=(0.0005, 0.0025, 0.01, 0.05, 0.25, 1.0, 5.0, 30.0),
    bound="11 an operation",
)
BLOB_BYTES = Metric(
    name="luthier_blob_bytes_total",
    kind="counter",
    help="Bytes read from and written to the blob store.",
    question="How much goes in and out?",
    labels=("operation",),
    unit="bytes",
    bound="one an operation",
)
BLOB_FAILURES = Metric(
    name="luthier_blob_failures_total",
    kind="counter",
    help="Operations that the blob store could not do; what the caller did wrong is none.",
    question="Does the blob store fail, and why?",
    labels=("operation", "reason"),
    bound="one an operation and reason that was met",
)
STORED_BYTES = Metric(
    name="luthier_blob_stored_bytes",
    kind="gauge",
    help="Bytes of blobs that something needs, and of those that nothing does and that are collected after a while; "
    "as of the last look at all of them, one every ten minutes.",
    question="How much is stored, and how much of it comes back by itself?",
    labels=("state",),
    unit="bytes",
    bound="2",
)
COLLECTED_BYTES = Metric(
    name="luthier_blob_collected_bytes_total",
    kind="counter",
    help="Bytes of blobs that were deleted because nothing needed them any more.",
    question="Does the disk come back after deletions?",
    unit="bytes",
)
PURGED = Metric(
    name="luthier_purged_resources_total",
    kind="counter",
    help="Deleted resources that are gone for good, by the table of their kind.",
    question="Do deleted resources go when their time is over?",
    labels=("table",),
    bound="one a kind of resource",
)
FREE = Metric(
    name="luthier_disk_free_bytes",
    kind="gauge",
    help="Room on the disk of the service's state.",
    question="When is the disk full?",
    unit="bytes",
)
FLOOR = Metric(
    name="luthier_disk_floor_bytes",
    kind="gauge",
    help="Room below which nothing new begins.",
    question="When does the service refuse new work?",
    unit="bytes",
)
