"""A trace from a program through services and workers to their children, as a real receiver of OTLP gets it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from tests.e2e.conftest import Cluster, write_examples
from tests.otlp import Received, Receiver, receiving

from luthier.client import Client
from luthier.errors import NotFound
from luthier.v1.dataset_pb2 import SPLIT_TRAIN, DatasetSource

pytestmark = pytest.mark.e2e
DATA = "luthier.v1.DataService"
WORKER = "luthier.worker.v1.WorkerService"


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
        found.start("data", "data-worker")
        yield found
    finally:
        found.stop()


@pytest.fixture(scope="module")
def program() -> trace.Tracer:
    """A program that uses OpenTelemetry: it keeps its own spans wherever it likes, here nowhere."""
    trace.set_tracer_provider(TracerProvider(shutdown_on_exit=False))
    return trace.get_tracer("program")


def spans_of(found: list[Received]) -> set[tuple[str, str]]:
    return {(one.process, one.name) for one in found}


def test_a_trace_goes_from_a_program_to_the_child_that_works_for_it(
    cluster: TracedCluster, receiver: Receiver, program: trace.Tracer, tmp_path: Path
) -> None:
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
    path = []
    at: Received | None = attempt
    while at is not None:
        path.append(at.name)
        at = by_id.get(at.span.parent_span_id)
    assert path == ["attempt BUILD_VERSION", "hand out BUILD_VERSION", f"{DATA}/CreateDatasetVersion"]
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
