"""A trace from a program through services and workers to their children, as a real receiver of OTLP gets it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from tests.e2e.conftest import SERVICES, TUNING_WORKERS, WAIT, Cluster, job, prepare, write_examples
from tests.otlp import Received, Receiver, receiving

from luthier.client import Client
from luthier.errors import NotFound
from luthier.v1.dataset_pb2 import SPLIT_TRAIN, DatasetSource
from luthier.v1.evaluation_pb2 import Evaluation, EvaluationArm

pytestmark = pytest.mark.e2e
DATA = "luthier.v1.DataService"
TRAINING = "luthier.v1.TrainingService"
EVALUATION = "luthier.v1.EvaluationService"
WORKER = "luthier.worker.v1.WorkerService"
TRAINED = f"{TRAINING}/CreateFineTuningJob"
TRAIN_PARTS = (
    "luthier-training-worker < child",
    "luthier-training-worker < loading checkpoint",
    "luthier-training-worker < training",
    f"luthier-data < {DATA}/ReadRendering",
    f"luthier-training < blob read < {WORKER}/GetBlob",
    f"luthier-training < blob write < {WORKER}/PutBlob",
    f"luthier-training < INSERT checkpoints < {WORKER}/CommitCheckpoint",
    f"luthier-training < INSERT models < {WORKER}/FinishTask",
)
"""Of an attempt to train after one that was lost: the process, and what it did as part of what."""
EVALUATED = f"{EVALUATION}/CreateEvaluation"
EVALUATE_PARTS = (
    "luthier-evaluation-worker < arm tuned, 2 of 2",
    f"luthier-data < {DATA}/ReadRecords",
    "luthier-training < blob read < luthier.v1.ModelService/DownloadModelFile",
    f"luthier-evaluation < blob write < {WORKER}/PutBlob",
    f"luthier-evaluation < UPDATE evaluations < {WORKER}/FinishTask",
)


class TracedCluster(Cluster):
    """A cluster whose processes send their spans to a receiver."""

    def __init__(self, home: Path, receiver: Receiver) -> None:
        super().__init__(home)
        self._receiver = receiver

    def environment(self) -> dict[str, str]:
        return super().environment() | {"LUTHIER_TRACES_ADDRESS": f"127.0.0.1:{self._receiver.port}"}


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as found:
        yield found


@pytest.fixture
def cluster(tmp_path: Path, receiver: Receiver) -> Iterator[TracedCluster]:
    found = TracedCluster(tmp_path / "home", receiver)
    try:
        yield found
    finally:
        found.stop()


@pytest.fixture(scope="module")
def own() -> InMemorySpanExporter:
    """Where a program that uses OpenTelemetry keeps its own spans: wherever it likes."""
    return InMemorySpanExporter()


@pytest.fixture(scope="module")
def program(own: InMemorySpanExporter) -> trace.Tracer:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(own))
    trace.set_tracer_provider(provider)
    return trace.get_tracer("program")


def spans_of(found: list[Received]) -> set[tuple[str, str]]:
    return {(one.process, one.name) for one in found}


def way_up(at: Received | None, by_id: Mapping[bytes, Received]) -> list[str]:
    """What a span is part of, as far up as it was received, itself first."""
    way = []
    while at is not None:
        way.append(at.name)
        at = by_id.get(at.span.parent_span_id)
    return way


def test_a_trace_goes_from_a_program_to_the_child_that_works_for_it(
    cluster: TracedCluster, receiver: Receiver, program: trace.Tracer, tmp_path: Path
) -> None:
    cluster.start("data", "data-worker")
    with cluster.client() as client:
        with program.start_as_current_span("prepare") as span:
            name = built(client, write_examples(tmp_path / "rows.jsonl", 20))
            with pytest.raises(NotFound):
                client.datasets.get("nothing")
        trace_id = f"{span.get_span_context().trace_id:032x}"
        cluster.end("data-worker", within_seconds=30)
        cluster.end("data", within_seconds=30)
    found = receiver.of(trace_id)
    wanted = {
        ("luthier-data", f"{DATA}/CreateDataset"),
        ("luthier-data", f"{DATA}/WriteUpload"),
        ("luthier-data", f"{DATA}/CreateDatasetVersion"),
        ("luthier-data", "INSERT tasks"),
        ("luthier-data", "COMMIT"),
        ("luthier-data", "blob append"),
        ("luthier-data", "hand out BUILD_VERSION"),
        ("luthier-data-worker", "attempt BUILD_VERSION"),
        ("luthier-data-worker", "child"),
        ("luthier-data-worker", "building"),
        ("luthier-data", f"{WORKER}/PutBlob"),
        ("luthier-data", f"{WORKER}/FinishTask"),
    }
    assert wanted <= spans_of(found), wanted - spans_of(found)
    by_id = {one.span.span_id: one for one in found}
    (attempt,) = [one for one in found if one.name == "attempt BUILD_VERSION"]
    assert attempt.attributes["luthier.subject"] == name
    way = ["attempt BUILD_VERSION", "hand out BUILD_VERSION", f"{DATA}/CreateDatasetVersion"]
    assert way_up(attempt, by_id) == way
    (child,) = [one for one in found if one.name == "child"]
    assert child.span.parent_span_id == attempt.span.span_id
    assert child.attributes["process.pid"] != attempt.attributes.get("process.pid")
    (missing,) = [one for one in found if one.name == f"{DATA}/GetDataset"]
    assert missing.attributes["luthier.reason"] == "RESOURCE_NOT_FOUND"
    for log in ("data", "data-worker"):
        assert trace_id in (cluster.home / f"{log}.log").read_text(), f"lines of {log} lead to the trace"


def built(client: Client, path: Path) -> str:
    """Upload a file and have a version built of it; returns the version's name."""
    client.datasets.create("traced")
    source = DatasetSource(upload=client.datasets.upload(path).name, split=SPLIT_TRAIN)
    version = client.datasets.create_version("traced", [source])
    return client.datasets.versions.wait(version.name, timeout_seconds=120).name


def test_a_job_that_loses_its_worker_and_an_evaluation_are_of_the_trace_that_asked_for_them(
    cluster: TracedCluster, receiver: Receiver, program: trace.Tracer, own: InMemorySpanExporter
) -> None:
    workers = (*TUNING_WORKERS, "evaluation-worker")
    cluster.start(*SERVICES, *workers)
    with cluster.client() as client:
        rendering = prepare(cluster, client)
        version = client.renderings.get(rendering).dataset_version
        with program.start_as_current_span("tune") as span:
            tuned = client.jobs.create(job(rendering, 240, checkpoint_interval_steps=30), job_id="tuned").name
            once_stored(client, tuned, lambda: cluster.kill("training-worker"))
            cluster.start("training-worker")
            model = client.jobs.wait(tuned, timeout_seconds=WAIT).tuned_model
            arms = [EvaluationArm(arm_id="base", model="tiny"), EvaluationArm(arm_id="tuned", model=model)]
            wanted = Evaluation(dataset_version=version, arms=arms, max_new_tokens=8)
            evaluation = client.evaluations.create(wanted).name
            client.evaluations.wait(evaluation, timeout_seconds=WAIT)
    for name in (*workers, *SERVICES):
        cluster.end(name, within_seconds=60)
    found = receiver.of(f"{span.get_span_context().trace_id:032x}")
    answered = assert_goes_down(found, "TRAIN", tuned, (TRAINED, *TRAIN_PARTS))
    assert own_way(own, answered) == [TRAINED, "tune"]
    answered = assert_goes_down(found, "EVALUATE", evaluation, (EVALUATED, *EVALUATE_PARTS))
    assert own_way(own, answered) == [EVALUATED, "tune"]
    first, second = sorted(
        (one for one in found if one.name == "hand out TRAIN"),
        key=lambda one: one.attributes["luthier.attempt"],
    )
    assert [len(first.span.links), [one.span_id for one in second.span.links]] == [0, [first.span.span_id]]
    (lost,) = [one for one in found if one.name == "lost TRAIN"]
    assert (lost.span.parent_span_id, lost.span.status.message) == (first.span.span_id, "WORKER_LOST")
    (attempt,) = [one for one in found if one.name == "attempt TRAIN"]
    assert attempt.span.parent_span_id == second.span.span_id
    assert attempt.attributes["luthier.attempt"] == 2
    (child,) = [one for one in found if one.name == "child" and one.process == "luthier-training-worker"]
    assert child.attributes["process.pid"] > 0


def assert_goes_down(found: list[Received], kind: str, subject: str, parts: Sequence[str]) -> Received:
    """Hold a trace to going from a call through its task to the one attempt that ended, and to what that did.

    `parts`: the call's name, then of each part the process, and what it did as part of what. Returns the call.
    """
    call, *below = parts
    by_id = {one.span.span_id: one for one in found}
    (attempt,) = [one for one in found if one.name == f"attempt {kind}"]
    assert attempt.attributes["luthier.subject"] == subject
    way = way_up(attempt, by_id)
    assert way == [f"attempt {kind}", f"hand out {kind}", call]
    ways = {" < ".join((one.process, *way_up(one, by_id))) for one in found}
    service = attempt.process.removesuffix("-worker")
    wanted = {f"{service} < {name} < {call}" for name in ("INSERT tasks", "COMMIT")}
    wanted |= {" < ".join((part, *way)) for part in below}
    assert wanted <= ways, wanted - ways
    return by_id[by_id[attempt.span.parent_span_id].span.parent_span_id]


def own_way(own: InMemorySpanExporter, call: Received) -> list[str]:
    """What of the program's own a call that a service answers is part of, as far up as there is any."""
    spans = {one.context.span_id: one for one in own.get_finished_spans() if one.context is not None}
    at = spans.get(int.from_bytes(call.span.parent_span_id, "big"))
    way = []
    while at is not None:
        way.append(at.name)
        at = spans.get(at.parent.span_id) if at.parent is not None else None
    return way


def once_stored(client: Client, name: str, act: Callable[[], None]) -> None:
    """Act when a job has a checkpoint, and long before its end."""
    for event in client.jobs.watch(name):
        if event.HasField("checkpoint"):
            act()
            return
    pytest.fail(f"{name} ended without a checkpoint")
