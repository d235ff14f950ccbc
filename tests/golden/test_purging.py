"""Every kind of resource made, deleted and purged many times while calls go on: nothing of them is left."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.golden.answers import Asker
from tests.golden.home_files import unpack_home
from tests.golden.making import RestingCluster

from luthier.work.peers import error_of

HOME = Path(__file__).parent / "homes" / "2026-11-28-9e0ed6d"
DATA, TRAINING = "luthier.v1.DataService", "luthier.v1.TrainingService"
MODELS, EVALUATION = "luthier.v1.ModelService", "luthier.v1.EvaluationService"
PARENT = "projects/default"
BASE = f"{PARENT}/models/tiny"
VERSION = f"{PARENT}/datasets/things/versions/v1"
RENDERING = f"{PARENT}/renderings/chat"
SERVICES = ("data", "training", "evaluation")
SOON_SECONDS = 60.0
P99_SECONDS = 0.1
pytestmark = pytest.mark.e2e


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[RestingCluster]:
    """Services on a home with something of every kind; no worker changes any."""
    running = RestingCluster(tmp_path / "home")
    unpack_home(HOME, running.home)
    try:
        running.start(*SERVICES)
        yield running
    finally:
        running.stop()


@pytest.fixture
def asker(cluster: RestingCluster) -> Iterator[Asker]:
    with Asker(cluster.addresses, cluster.api_key()) as asking:
        yield asking


def rows(home: Path) -> dict[str, int]:
    """How many rows each table has, by service; queues of holds between services settle by themselves."""
    found = {}
    for service in SERVICES:
        database = f"file:{home / service / service}.db?mode=ro"
        with contextlib.closing(sqlite3.connect(database, uri=True)) as connection:
            tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type='table'")]
            for table in tables:
                if not table.startswith("sqlite_"):
                    number = connection.execute(f'SELECT count(*) FROM "{table}"').fetchone()[0]
                    found[f"{service}.{table}"] = number
    return found


def files(home: Path) -> dict[str, int]:
    """Each blob's size."""
    return {
        str(path.relative_to(home)): path.stat().st_size
        for service in SERVICES
        for path in (home / service / "blobs").rglob("*")
        if path.is_file()
    }


def soon(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON_SECONDS
    while not done():
        assert time.monotonic() < deadline, f"not within {SOON_SECONDS:g} s"
        time.sleep(0.2)


class Lives:
    """Makes one resource of each kind, ends it, deletes it and purges it."""

    def __init__(self, asker: Asker, directory: str, upload: str) -> None:
        self._asker = asker
        self._directory = directory
        self._upload = upload

    def one_round(self, number: int) -> None:
        ask, made = self._asker.send, {"parent": PARENT}
        dataset = ask(f"{DATA}/CreateDataset", {**made, "datasetId": f"d{number}", "dataset": {}}).name
        version = {"sources": [{"upload": self._upload}]}
        wanted = {"parent": dataset, "datasetVersionId": "v", "datasetVersion": version}
        self._end(f"{DATA}/{{}}DatasetVersion", ask(f"{DATA}/CreateDatasetVersion", wanted).name)
        self._gone(f"{DATA}/{{}}Dataset", dataset)
        upload = ask(f"{DATA}/StartUpload", {**made, "upload": {"filename": "a.jsonl"}}).name
        self._end(f"{DATA}/{{}}Upload", upload)
        wanted = {**made, "renderingId": f"r{number}", "rendering": {"datasetVersion": VERSION, "model": BASE}}
        self._end(f"{DATA}/{{}}Rendering", ask(f"{DATA}/CreateRendering", wanted).name)
        wanted = {**made, "modelId": f"m{number}", "model": {"directory": self._directory}}
        self._end(f"{MODELS}/{{}}Model", ask(f"{MODELS}/RegisterBaseModel", wanted).name)
        job = {"baseModel": BASE, "rendering": RENDERING, "hyperparameters": {"batchRows": 4}}
        wanted = {**made, "fineTuningJobId": f"j{number}", "fineTuningJob": job}
        self._end(f"{TRAINING}/{{}}FineTuningJob", ask(f"{TRAINING}/CreateFineTuningJob", wanted).name)
        evaluation = {"datasetVersion": VERSION, "arms": [{"armId": "zero", "model": BASE}]}
        wanted = {**made, "evaluationId": f"e{number}", "evaluation": evaluation}
        self._end(f"{EVALUATION}/{{}}Evaluation", ask(f"{EVALUATION}/CreateEvaluation", wanted).name)

    def _end(self, rpc: str, name: str) -> None:
        self._asker.send(rpc.format("Cancel"), {"name": name})
        self._gone(rpc, name)

    def _gone(self, rpc: str, name: str) -> None:
        for verb in ("Delete", "Undelete", "Delete", "Purge"):
            self._asker.send(rpc.format(verb), {"name": name})


class Calls(threading.Thread):
    """Reads and lists all the while, and notes how long each call took."""

    def __init__(self, asker: Asker) -> None:
        super().__init__(daemon=True)
        self.seconds: list[float] = []
        self.over = threading.Event()
        self._asker = asker

    def run(self) -> None:
        calls: list[tuple[str, Mapping[str, Any]]] = [
            (f"{MODELS}/GetModel", {"name": BASE}),
            (f"{TRAINING}/ListFineTuningJobs", {"parent": PARENT, "pageSize": 10}),
            (f"{DATA}/GetRendering", {"name": RENDERING}),
            (f"{EVALUATION}/ListEvaluations", {"parent": PARENT, "pageSize": 10}),
        ]
        while not self.over.is_set():
            for rpc, request in calls:
                began = time.monotonic()
                self._asker.send(rpc, request)
                self.seconds.append(time.monotonic() - began)
            time.sleep(0.01)


@pytest.mark.parametrize(
    "rounds", [20, pytest.param(1000, marks=pytest.mark.slow)], ids=["few", "a thousand"]
)
def test_nothing_is_left_of_what_was_purged(cluster: RestingCluster, asker: Asker, rounds: int) -> None:
    directory = asker.send(f"{MODELS}/GetModel", {"name": BASE}).directory
    version = asker.send(f"{DATA}/GetDatasetVersion", {"name": f"{PARENT}/datasets/mixed/versions/pairs"})
    lives = Lives(asker, directory, version.sources[0].upload)
    lives.one_round(0)
    soon(lambda: rows(cluster.home)["training.held_elsewhere"] >= 0)
    time.sleep(10.0)
    before, bytes_before = rows(cluster.home), files(cluster.home)
    calls = Calls(asker)
    calls.start()
    for number in range(1, rounds + 1):
        lives.one_round(number)
    soon(lambda: rows(cluster.home) == before)
    calls.over.set()
    calls.join(30)
    assert files(cluster.home) == bytes_before
    took = sorted(calls.seconds)
    p99 = took[int(0.99 * len(took))]
    print(f"{len(took)} calls, p99 {1000 * p99:.1f} ms, {os.getloadavg()[0]:.1f} load")
    if rounds >= 1000:
        assert p99 <= P99_SECONDS


def refusal(asker: Asker, rpc: str, request: Mapping[str, Any]) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as caught:
        asker.send(rpc, request)
    error = error_of(caught.value)
    return error.code, error.reason


def test_a_job_comes_back_with_all_that_it_had_and_goes_with_it(
    cluster: RestingCluster, asker: Asker
) -> None:
    name = f"{PARENT}/fineTuningJobs/own-template"

    def told() -> list[Any]:
        return [
            asker.send(f"{TRAINING}/ReadFineTuningJobMetrics", {"name": name}),
            asker.send(f"{TRAINING}/ListCheckpoints", {"parent": name}),
            asker.send(f"{TRAINING}/ListFineTuningJobEvents", {"parent": name}),
            asker.send(f"{TRAINING}/ListRollouts", {"parent": name}),
        ]

    job, before = asker.send(f"{TRAINING}/GetFineTuningJob", {"name": name}), told()
    assert before[1].checkpoints
    asker.send(f"{TRAINING}/DeleteFineTuningJob", {"name": name})
    assert refusal(asker, f"{TRAINING}/GetFineTuningJob", {"name": name})[0] == "NOT_FOUND"
    back = asker.send(f"{TRAINING}/UndeleteFineTuningJob", {"name": name})
    assert back.uid == job.uid
    assert told() == before
    asker.send(f"{TRAINING}/DeleteFineTuningJob", {"name": name})
    kept = rows(cluster.home)
    asker.send(f"{TRAINING}/PurgeFineTuningJob", {"name": name, "uid": job.uid})
    assert refusal(asker, f"{TRAINING}/UndeleteFineTuningJob", {"name": name})[0] == "NOT_FOUND"
    soon(lambda: rows(cluster.home)["training.fine_tuning_jobs"] == kept["training.fine_tuning_jobs"] - 1)
    gone = rows(cluster.home)
    assert kept["training.checkpoints"] - gone["training.checkpoints"] == len(before[1].checkpoints)
    assert kept["training.metric_points"] - gone["training.metric_points"] == len(before[0].points)
    assert kept["training.events"] > gone["training.events"]
