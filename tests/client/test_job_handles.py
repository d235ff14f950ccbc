"""A job in the hand, its metrics as tables, and how both look in a notebook."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any

import pyarrow
import pytest
from IPython.core.interactiveshell import InteractiveShell

from luthier.client import AsyncClient, Client, JobFailed
from luthier.client.metric_table import MetricTable
from luthier.client.notebooks import list_html, load_ipython_extension, register, resource_html
from luthier.errors import FailedPrecondition
from luthier.v1.event_pb2 import Event, StateChange
from luthier.v1.fine_tuning_job_pb2 import Checkpoint, FineTuningJob, MetricPoint, RunRecord
from luthier.v1.training_service_pb2 import (
    ListCheckpointsResponse,
    ListFineTuningJobDeliveriesResponse,
    ListFineTuningJobEventsResponse,
    ReadFineTuningJobMetricsResponse,
)
from luthier.v1.webhook_pb2 import WebhookDelivery

NAME = "projects/default/fineTuningJobs/one"
POINTS = [
    MetricPoint(step=1, values={"train_loss": 2.5}),
    MetricPoint(step=2, values={"train_loss": 2.25, "validation_loss": 3.0}),
]


class Service:
    """A job that goes on by one state each time that it is read."""

    def __init__(self, services: Any, *states: FineTuningJob.State.ValueType) -> None:
        self._states = list(states)
        services.answers |= {
            "CreateFineTuningJob": lambda request, context: self.job(FineTuningJob.STATE_QUEUED),
            "GetFineTuningJob": lambda request, context: self.job(
                self._states.pop(0) if len(self._states) > 1 else self._states[0]
            ),
            "CancelFineTuningJob": lambda request, context: self.job(FineTuningJob.STATE_CANCELLED),
            "PauseFineTuningJob": lambda request, context: self.job(FineTuningJob.STATE_PAUSING),
            "ResumeFineTuningJob": lambda request, context: self.job(FineTuningJob.STATE_QUEUED),
            "WatchFineTuningJob": self.watch,
            "ListFineTuningJobEvents": lambda request, context: ListFineTuningJobEventsResponse(
                events=[Event(sequence=1)]
            ),
            "ReadFineTuningJobMetrics": lambda request, context: ReadFineTuningJobMetricsResponse(
                points=POINTS
            ),
            "ListCheckpoints": lambda request, context: ListCheckpointsResponse(
                checkpoints=[Checkpoint(name=f"{NAME}/checkpoints/25", step=25)]
            ),
            "ListFineTuningJobDeliveries": lambda request, context: ListFineTuningJobDeliveriesResponse(
                deliveries=[WebhookDelivery(delivery_id="msg_1")]
            ),
        }

    def job(self, state: FineTuningJob.State.ValueType) -> FineTuningJob:
        return FineTuningJob(name=NAME, uid="u1", state=state)

    def watch(self, request: Any, context: Any) -> Iterator[Event]:
        yield Event(sequence=1, state_change=StateChange(state="RUNNING"))
        yield Event(sequence=2, state_change=StateChange(state="SUCCEEDED"))


def test_a_job_in_the_hand_is_asked_without_its_name(services: Any, client: Client) -> None:
    Service(services, FineTuningJob.STATE_RUNNING, FineTuningJob.STATE_SUCCEEDED)
    job = client.jobs.start(FineTuningJob(base_model="m", rendering="r"))
    assert (job.name, job.state, repr(job)) == (NAME, "QUEUED", f"<job {NAME}, last seen QUEUED>")
    assert job.refresh().state == FineTuningJob.STATE_RUNNING
    seen: list[Event] = []
    done = job.wait(timeout_seconds=10, on_event=seen.append)
    assert (done.state, job.state, len(seen)) == (FineTuningJob.STATE_SUCCEEDED, "SUCCEEDED", 2)
    assert [point.step for point in job.metrics()] == [1, 2]
    assert [one.step for one in job.checkpoints()] == [25]
    assert [one.delivery_id for one in job.deliveries()] == ["msg_1"]
    assert [one.sequence for one in job.events()] == [1]
    assert [one.sequence for one in job.watch()] == [1, 2]
    job.pause()
    assert job.state == "PAUSING"
    job.resume()
    assert job.state == "QUEUED"
    assert job.cancel().state == FineTuningJob.STATE_CANCELLED
    assert job.state == "CANCELLED"


def test_a_job_that_is_there_is_taken_in_the_hand(services: Any, client: Client) -> None:
    Service(services, FineTuningJob.STATE_FAILED)
    job = client.jobs.handle("one")
    assert job.state == "FAILED"
    with pytest.raises(JobFailed):
        job.wait(timeout_seconds=10)


async def test_the_async_client_has_the_same(services: Any, async_client: AsyncClient) -> None:
    Service(services, FineTuningJob.STATE_RUNNING, FineTuningJob.STATE_SUCCEEDED)
    job = await async_client.jobs.start(FineTuningJob(base_model="m", rendering="r"))
    assert (await job.refresh()).state == FineTuningJob.STATE_RUNNING
    assert (await job.wait(timeout_seconds=10)).state == FineTuningJob.STATE_SUCCEEDED
    assert job.state == "SUCCEEDED"
    assert (await job.metrics()).names == ("train_loss", "validation_loss")
    assert [one.step async for one in job.checkpoints()] == [25]
    assert [one.delivery_id async for one in job.deliveries()] == ["msg_1"]
    assert [one.sequence async for one in job.events()] == [1]
    assert [one.sequence async for one in job.watch()] == [1, 2]
    assert (await job.pause()).state == FineTuningJob.STATE_PAUSING
    assert (await job.resume()).state == FineTuningJob.STATE_QUEUED
    assert (await (await async_client.jobs.handle("one")).cancel()).state == FineTuningJob.STATE_CANCELLED
    assert "QUEUED" in str(job._repr_html_()) or "SUCCEEDED" in str(job._repr_html_())


def test_metrics_are_tables(services: Any, client: Client) -> None:
    Service(services, FineTuningJob.STATE_SUCCEEDED)
    table = client.jobs.metric_table("one")
    arrow = table.to_arrow()
    assert arrow.schema == pyarrow.schema(
        [("step", pyarrow.int64()), ("train_loss", pyarrow.float64()), ("validation_loss", pyarrow.float64())]
    )
    assert arrow.to_pydict() == {
        "step": [1, 2],
        "train_loss": [2.5, 2.25],
        "validation_loss": [None, 3.0],
    }
    frame = table.to_pandas()
    assert (frame.index.name, list(frame.index)) == ("step", [1, 2])
    assert list(frame["train_loss"]) == [2.5, 2.25]
    assert math.isnan(frame.loc[1, "validation_loss"])
    assert (len(table), table[0].step, len(table[1:]), table[1:].names) == (
        2,
        1,
        1,
        ("train_loss", "validation_loss"),
    )
    with pytest.raises(KeyError, match="no metric 'loss'; there are train_loss, validation_loss"):
        table.column("loss")


def test_of_no_metrics_there_is_an_empty_table() -> None:
    table = MetricTable(())
    assert table.to_arrow().num_rows == 0
    assert len(table.to_pandas()) == 0
    assert table.names == ()


@pytest.mark.parametrize(("package", "method"), [("pyarrow", "to_arrow"), ("pandas", "to_pandas")])
def test_without_a_package_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, package: str, method: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(FailedPrecondition, match="pip install"):
        getattr(MetricTable(POINTS), method)()


@pytest.fixture
def shell() -> Iterator[InteractiveShell]:
    """IPython, as a notebook runs it."""
    made = InteractiveShell.instance()
    yield made
    InteractiveShell.clear_instance()


def html(shell: InteractiveShell, value: object) -> str:
    display: Any = shell.display_formatter
    shown, _ = display.format(value)
    return str(shown.get("text/html", ""))


def test_a_notebook_shows_resources_and_lists_of_them_as_tables(
    shell: InteractiveShell, client: Client
) -> None:
    """The client that was made told IPython so."""
    del client
    load_ipython_extension(shell)
    job = FineTuningJob(
        name=NAME,
        uid="u1",
        state=FineTuningJob.STATE_FAILED,
        display_name="<b>bold</b>",
        base_model="projects/default/models/m",
        run_record=RunRecord(kernels={f"kernel_{number}": "cpp avx2" for number in range(40)}),
    )
    one = html(shell, job)
    assert one.startswith("<table><caption>FineTuningJob</caption>")
    assert ">FAILED</b>" in one
    assert ">m</td>" in one
    assert "&lt;b&gt;bold&lt;/b&gt;" in one
    assert "<b>bold</b>" not in one
    assert "<details>" in one, "what is long is folded away"
    assert "u1" not in one
    many = html(shell, [job, FineTuningJob(name=f"{NAME}2")])
    assert "2 of FineTuningJob" in many
    assert many.count("<tr>") == 3
    assert html(shell, [1, 2]) == ""
    assert html(shell, [job, "x"]) == ""
    assert html(shell, []) == ""
    assert "the last 2 of 2 steps" in html(shell, MetricTable(POINTS))


def test_a_client_tells_ipython_by_itself(shell: InteractiveShell) -> None:
    assert html(shell, FineTuningJob(name=NAME)) == ""
    register()
    assert "FineTuningJob" in html(shell, FineTuningJob(name=NAME))


def test_outside_of_notebooks_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    register()
    assert "IPython" not in sys.modules


def test_messages_of_others_look_as_ever() -> None:
    from google.protobuf.struct_pb2 import Struct

    assert resource_html(Struct()) is None
    assert list_html([Struct()]) is None


def test_a_job_in_the_hand_shows_how_it_stands_now(services: Any, client: Client) -> None:
    Service(services, FineTuningJob.STATE_QUEUED, FineTuningJob.STATE_RUNNING)
    job = client.jobs.handle("one")
    assert job.state == "QUEUED"
    assert ">RUNNING</b>" in str(job._repr_html_())
