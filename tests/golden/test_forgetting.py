"""What is over goes when its time is over, in a home of former times in which there is much of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.golden.answers import Asker
from tests.golden.former import HOME, SERVICES, opened, running, soon
from tests.golden.home_files import unpack_home
from tests.golden.lives import DATA, EVALUATION, MODELS, PARENT, TRAINING
from tests.golden.making import RestingCluster

from luthier.work.peers import error_of

# What needs others before those.
KINDS_DELETED = (
    (EVALUATION, "Evaluation", PARENT),
    (TRAINING, "FineTuningJob", PARENT),
    (MODELS, "Model", PARENT),
    (DATA, "Rendering", PARENT),
    (DATA, "DatasetVersion", f"{PARENT}/datasets/mixed"),
    (DATA, "Upload", PARENT),
    (DATA, "Dataset", PARENT),
)
pytestmark = pytest.mark.e2e


class ForgettingCluster(RestingCluster):
    """Services that keep what is over for an hour."""

    def environment(self) -> dict[str, str]:
        return super().environment() | {
            f"LUTHIER_{name.upper()}_{what}_KEEP_SECONDS": "3600"
            for name in SERVICES
            for what in ("EVENT", "TASK", "ANSWER", "DELETED")
        }


@pytest.fixture(scope="module")
def forgetting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForgettingCluster]:
    """Services that keep little, on a home of former times in which there is much."""
    former = ForgettingCluster(tmp_path_factory.mktemp("forgetting") / "home")
    unpack_home(HOME, former.home)
    with running(former):
        yield former


def test_what_a_former_home_told_of_what_has_ended_goes_but_for_its_end(
    forgetting: ForgettingCluster,
) -> None:
    ended, waits = (f"{PARENT}/fineTuningJobs/{job}" for job in ("own-template", "queued"))
    with Asker(forgetting.addresses, forgetting.api_key()) as asker:

        def events_of(job: str) -> list[Any]:
            return list(asker.send(f"{TRAINING}/ListFineTuningJobEvents", {"parent": job}).events)

        soon(lambda: len(events_of(ended)) == 1)
        [last] = events_of(ended)
        assert last.state_change.state == "SUCCEEDED"
        assert last.sequence > 5
        watch = f"{TRAINING}/WatchFineTuningJob"
        assert list(asker.send(watch, {"name": ended})) == [last]
        with pytest.raises(grpc.RpcError) as caught:
            list(asker.send(watch, {"name": ended, "startSequence": "2"}))
        error = error_of(caught.value)
        assert (error.code, error.reason) == ("OUT_OF_RANGE", "SEQUENCE_EXPIRED")
        assert error.metadata["first_sequence"] == str(last.sequence)
        with forgetting.client() as client:
            assert [event.sequence for event in client.jobs.watch("own-template")] == [last.sequence]
            assert client.jobs.wait("own-template").name == ended
        assert events_of(waits)[0].sequence == 1, "what has not ended keeps all"
        assert asker.send(f"{TRAINING}/ReadFineTuningJobMetrics", {"name": ended}).points


def test_finished_tasks_and_answers_of_a_former_home_go(
    forgetting: ForgettingCluster, tmp_path: Path
) -> None:
    unpack_home(HOME, tmp_path / "former")
    hour_ago_us = round((time.time() - 3600) * 1e6)
    over = (
        f"SELECT count(*) FROM tasks WHERE state = 'DONE' AND ended_at_us < {hour_ago_us}",
        f"SELECT count(*) FROM request_log WHERE created_at_us < {hour_ago_us}",
    )

    def found(home: Path, service: str, statement: str) -> list[Any]:
        with opened(home, service) as connection:
            return [row[0] for row in connection.execute(statement)]

    def are_gone(service: str, statement: str) -> bool:
        return found(forgetting.home, service, statement) == [0]

    for service in SERVICES:
        not_over = set(found(tmp_path / "former", service, "SELECT task_id FROM tasks WHERE state != 'DONE'"))
        for statement in over:
            assert found(tmp_path / "former", service, statement) != [0]
            soon(partial(are_gone, service, statement))
        assert not_over <= set(found(forgetting.home, service, "SELECT task_id FROM tasks"))


def test_every_kind_of_resource_can_be_brought_back_for_as_long_as_is_set(
    forgetting: ForgettingCluster,
) -> None:
    with Asker(forgetting.addresses, forgetting.api_key()) as asker:
        asker.send(f"{DATA}/CreateDataset", {"parent": PARENT, "datasetId": "fresh", "dataset": {}})
        for service, kind, collection in KINDS_DELETED:
            listed = asker.send(f"{service}/List{kind}s", {"parent": collection})
            [found] = [value for field, value in listed.ListFields() if field.is_repeated]
            deleted = next(filter(None, (deleted_by(asker, f"{service}/Delete{kind}", one) for one in found)))
            kept = deleted.purge_time.ToMicroseconds() - deleted.delete_time.ToMicroseconds()
            assert kept == 3600 * 10**6, kind


def deleted_by(asker: Asker, rpc: str, resource: Any) -> Any:
    """A resource as it is deleted; None where it is at work, or something needs it."""
    try:
        return asker.send(rpc, {"name": resource.name})
    except grpc.RpcError as refused:
        if error_of(refused).reason not in ("WRONG_STATE", "RESOURCE_IN_USE"):
            raise
        return None
