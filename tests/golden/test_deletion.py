"""Deletion: of every kind, refused while it is needed, its name used again, and nothing old in what is new."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.golden.answers import SILENCE_SECONDS, Asker, plain
from tests.golden.home_files import unpack_home
from tests.golden.lineage import derived_resources, referred_names, referring_fields
from tests.golden.making import RestingCluster

from luthier.work.peers import error_of

HOME = Path(__file__).parent / "homes" / "2026-11-28-9e0ed6d"
DATA, TRAINING = "luthier.v1.DataService", "luthier.v1.TrainingService"
MODELS, EVALUATION = "luthier.v1.ModelService", "luthier.v1.EvaluationService"
PARENT = "projects/default"
BASE = f"{PARENT}/models/tiny"
VERSION = f"{PARENT}/datasets/things/versions/v1"
# Holds across services are taken up and let go in the background.
SOON_SECONDS = 30.0
DERIVED = {"DatasetVersion", "Rendering", "Model", "FineTuningJob", "Evaluation"}
KEPT_BY = dict.fromkeys(("datasets", "versions", "uploads", "renderings"), "data") | dict.fromkeys(
    ("models", "fineTuningJobs"), "training"
)
pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RestingCluster]:
    """Services on a home with every kind of resource in every state; no worker changes any."""
    running = RestingCluster(tmp_path_factory.mktemp("deletion") / "home")
    unpack_home(HOME, running.home)
    try:
        running.start("data", "training", "evaluation")
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def asker(cluster: RestingCluster) -> Iterator[Asker]:
    with Asker(cluster.addresses, cluster.api_key()) as asking:
        yield asking


def refusal(asker: Asker, rpc: str, request: Mapping[str, Any]) -> tuple[str, str, str]:
    """Code, reason and message of a call that must be refused."""
    with pytest.raises(grpc.RpcError) as caught:
        asker.send(rpc, request)
    error = error_of(caught.value)
    return error.code, error.reason, error.message


def soon(done: Callable[[], Any]) -> Any:
    """Wait for what services do in the background; return the first answer that is true."""
    deadline = time.monotonic() + SOON_SECONDS
    while not (answer := done()):
        assert time.monotonic() < deadline, f"not within {SOON_SECONDS:g} s"
        time.sleep(0.1)
    return answer


def refused_as(asker: Asker, rpc: str, name: str, reason: str) -> bool:
    return refusal(asker, rpc, {"name": name})[1] == reason


def deleted(asker: Asker, rpc: str, name: str) -> Any:
    """Delete what may still be held for a moment."""

    def once() -> Any:
        try:
            return asker.send(rpc, {"name": name})
        except grpc.RpcError as error:
            if error_of(error).reason != "RESOURCE_IN_USE":
                raise
            return None

    return soon(once)


def events(asker: Asker, rpc: str, name: str) -> list[tuple[int, str]]:
    """All events of a resource until they fall silent: their numbers and states."""
    stream = asker.send(rpc, {"name": name})
    silence = threading.Timer(SILENCE_SECONDS, stream.cancel)
    silence.start()
    found = []
    with contextlib.suppress(grpc.RpcError):
        for event in stream:
            found.append((event.sequence, event.state_change.state))
    silence.cancel()
    return found


def holders(cluster: RestingCluster, service: str, uid: str) -> list[str]:
    """Who holds a resource, as its service's database has it."""
    database = f"file:{cluster.home / service / service}.db?mode=ro"
    with contextlib.closing(sqlite3.connect(database, uri=True)) as connection:
        rows = connection.execute("SELECT holder FROM holds WHERE held = ? ORDER BY holder", (uid,))
        return [row[0] for row in rows]


# Fields that the home knows nothing of; test_starts.py, test_mixing.py and test_reward_models.py of tests/training/jobs
# have what has them, and test_several_bases.py, test_drift.py and test_rewards.py of tests/evaluation/worker.
YOUNGER = {
    "luthier.v1.DriftProbe.dataset_version",
    "luthier.v1.Evaluation.reward_model",
    "luthier.v1.EvaluationArm.base_model",
    "luthier.v1.FineTuningJob.start_from",
    "luthier.v1.Judge.base_model",
    "luthier.v1.Judge.model",
    "luthier.v1.Model.start_from",
    "luthier.v1.RenderingShare.rendering",
    "luthier.v1.RenderingUse.rendering",
    "luthier.v1.RewardModelGrader.model",
}


def test_every_resource_says_of_all_that_it_names_which_ones_they_were(asker: Asker) -> None:
    seen: dict[str, set[str]] = {}
    wanted: dict[str, set[str]] = {}
    for process, resource in derived_resources(asker, PARENT):
        kind = resource.DESCRIPTOR.name
        wanted.setdefault(kind, referring_fields(resource.DESCRIPTOR) - YOUNGER)
        references = {one.name: one for one in resource.references}
        assert len(references) == len(resource.references), resource
        for field, name in referred_names(resource):
            assert name in references, f"{resource.name} does not say which {name} its {field} was"
            seen.setdefault(kind, set()).add(field)
        for one in resource.references:
            assert one.uid or KEPT_BY[one.name.split("/")[-2]] != process, f"{resource.name}: {one}"
    assert wanted.keys() == DERIVED
    assert seen == wanted, "each such field is set somewhere in the home"


@pytest.mark.parametrize(
    ("rpc", "name"),
    [
        (f"{DATA}/DeleteDatasetVersion", f"{PARENT}/datasets/empty/versions/{state}")
        for state in ("queued", "building", "cancelling")
    ]
    + [
        (f"{DATA}/DeleteRendering", f"{PARENT}/renderings/{state}")
        for state in ("queued", "rendering", "cancelling")
    ]
    + [(f"{MODELS}/DeleteModel", f"{PARENT}/models/{state}") for state in ("queued", "registering")]
    + [
        (f"{TRAINING}/DeleteFineTuningJob", f"{PARENT}/fineTuningJobs/{state}")
        for state in ("queued", "preparing", "running", "cancelling", "given-back")
    ]
    + [
        (f"{EVALUATION}/DeleteEvaluation", f"{PARENT}/evaluations/{state}")
        for state in ("queued", "cancelling")
    ],
)
def test_what_has_not_ended_is_not_deleted(asker: Asker, rpc: str, name: str) -> None:
    code, reason, message = refusal(asker, rpc, {"name": name})
    assert (code, reason) == ("FAILED_PRECONDITION", "WRONG_STATE")
    assert message.startswith(f"{name} must have ended before it is deleted, it is "), message


@pytest.mark.parametrize(
    ("rpc", "name", "holder"),
    [
        (f"{DATA}/DeleteDataset", f"{PARENT}/datasets/things", VERSION),
        (f"{DATA}/DeleteDatasetVersion", VERSION, f"{PARENT}/evaluations/"),
        (f"{DATA}/DeleteRendering", f"{PARENT}/renderings/chat", f"{PARENT}/fineTuningJobs/"),
        (f"{MODELS}/DeleteModel", BASE, f"{PARENT}/evaluations/"),
        (f"{MODELS}/DeleteModel", f"{PARENT}/models/taught-model", f"{PARENT}/evaluations/"),
    ],
)
def test_what_is_needed_since_before_deletion_was_there_is_not_deleted(
    cluster: RestingCluster, asker: Asker, rpc: str, name: str, holder: str
) -> None:
    """The migrated home knows who needs what; what is needed elsewhere is held as soon as the services have met.

    A deletion before that would go through, and take from the other tests: what is there is looked at first.
    """
    service = KEPT_BY[name.split("/")[-2]]
    uid = asker.send(rpc.replace("/Delete", "/Get"), {"name": name}).uid
    soon(lambda: any(one.startswith(holder) for one in holders(cluster, service, uid)))
    code, reason, message = refusal(asker, rpc, {"name": name})
    assert (code, reason) == ("FAILED_PRECONDITION", "RESOURCE_IN_USE")
    assert message.startswith(f"{name} is needed by {holder}"), message


def test_a_wrong_etag_deletes_nothing_and_a_repeated_call_gets_its_first_answer(asker: Asker) -> None:
    parent = f"{PARENT}/datasets/twice"
    made = asker.send(f"{DATA}/CreateDataset", {"parent": PARENT, "datasetId": "twice", "dataset": {}})
    assert refusal(asker, f"{DATA}/DeleteDataset", {"name": parent, "etag": '"9"'})[0] == "ABORTED"
    once = {"name": parent, "etag": made.etag, "requestId": "7c1f9ae2-0a53-4f1e-9df3-0c57a3c5a001"}
    first = asker.send(f"{DATA}/DeleteDataset", once)
    assert first.HasField("delete_time")
    assert asker.send(f"{DATA}/DeleteDataset", once) == first
    assert refusal(asker, f"{DATA}/DeleteDataset", {"name": parent})[0] == "NOT_FOUND"


def test_what_is_needed_by_what_may_come_back_is_not_purged_and_who_needs_it_is_named(asker: Asker) -> None:
    parent = {"parent": PARENT, "datasetId": "held", "dataset": {}}
    dataset = asker.send(f"{DATA}/CreateDataset", parent).name
    upload = asker.send(f"{DATA}/GetDatasetVersion", {"name": VERSION}).sources[0].upload
    request = {
        "parent": dataset,
        "datasetVersionId": "v",
        "datasetVersion": {"sources": [{"upload": upload}]},
    }
    version = asker.send(f"{DATA}/CreateDatasetVersion", request).name
    asker.send(f"{DATA}/CancelDatasetVersion", {"name": version})
    for kind, name in (("DatasetVersion", version), ("Dataset", dataset)):
        asker.send(f"{DATA}/Delete{kind}", {"name": name})
    code, reason, message = refusal(asker, f"{DATA}/PurgeDataset", {"name": dataset})
    assert (code, reason) == ("FAILED_PRECONDITION", "RESOURCE_IN_USE")
    assert message == f"{dataset} is needed by {version}, until they are purged"
    for kind, name in (("DatasetVersion", version), ("Dataset", dataset)):
        asker.send(f"{DATA}/Purge{kind}", {"name": name})
        assert refusal(asker, f"{DATA}/Undelete{kind}", {"name": name})[0] == "NOT_FOUND"


def test_a_dataset_its_version_and_upload_are_deleted_and_made_again(asker: Asker) -> None:
    dataset, parent = f"{PARENT}/datasets/mixed", {"parent": PARENT, "datasetId": "mixed"}
    old = asker.send(f"{DATA}/GetDatasetVersion", {"name": f"{dataset}/versions/pairs"})
    upload = old.sources[0].upload
    assert [reference.name for reference in old.references] == [dataset, upload]
    old_dataset = asker.send(f"{DATA}/GetDataset", {"name": dataset})
    assert old.references[0].uid == old_dataset.uid
    for version in ("v1", "bad", "pairs"):
        assert refused_as(asker, f"{DATA}/DeleteDataset", dataset, "RESOURCE_IN_USE")
        gone = asker.send(f"{DATA}/DeleteDatasetVersion", {"name": f"{dataset}/versions/{version}"})
        assert gone.HasField("delete_time")
    listed = asker.send(f"{DATA}/ListDatasetVersions", {"parent": dataset})
    assert list(listed.dataset_versions) == []
    asker.send(f"{DATA}/DeleteDataset", {"name": dataset})
    made = asker.send(f"{DATA}/CreateDataset", {**parent, "dataset": {"displayName": "again"}})
    assert made.uid != old_dataset.uid
    request = {
        "parent": dataset,
        "datasetVersionId": "pairs",
        "datasetVersion": {"sources": [{"upload": upload}]},
    }
    again = asker.send(f"{DATA}/CreateDatasetVersion", request)
    assert again.uid != old.uid
    assert (again.references[0].uid, again.references[1].uid) == (made.uid, old.references[1].uid)
    assert events(asker, f"{DATA}/WatchDatasetVersion", again.name) == [(1, "QUEUED")], (
        "no old event in a new one"
    )
    # The rendering of the deleted version still says which one that was.
    rendering = asker.send(f"{DATA}/GetRendering", {"name": f"{PARENT}/renderings/pairs"})
    assert (rendering.references[0].uid, rendering.references[0].digest) == (old.uid, old.digest)
    assert refused_as(asker, f"{DATA}/DeleteUpload", upload, "RESOURCE_IN_USE"), "it is being built from"
    asker.send(f"{DATA}/CancelDatasetVersion", {"name": again.name})
    assert asker.send(f"{DATA}/DeleteUpload", {"name": upload}).HasField("delete_time")
    assert refusal(asker, f"{DATA}/GetUpload", {"name": upload})[0] == "NOT_FOUND"


def test_an_upload_that_is_being_received_is_cancelled_first(asker: Asker) -> None:
    name = asker.send(f"{DATA}/StartUpload", {"parent": PARENT, "upload": {"filename": "a.jsonl"}}).name
    assert refusal(asker, f"{DATA}/DeleteUpload", {"name": name})[1] == "WRONG_STATE"
    asker.send(f"{DATA}/CancelUpload", {"name": name})
    asker.send(f"{DATA}/DeleteUpload", {"name": name})


def test_a_rendering_a_job_and_its_model_are_deleted_and_made_again(asker: Asker) -> None:
    rendering = f"{PARENT}/renderings/own-template"
    old = asker.send(f"{DATA}/GetRendering", {"name": rendering})
    job = {"baseModel": BASE, "rendering": rendering, "hyperparameters": {"numEpochs": 1, "batchRows": 4}}
    request = {"parent": PARENT, "fineTuningJobId": "lineage", "fineTuningJob": job}
    made = asker.send(f"{TRAINING}/CreateFineTuningJob", request)
    code, _, message = refusal(asker, f"{DATA}/DeleteRendering", {"name": rendering})
    assert (code, message.partition(", until")[0]) == (
        "FAILED_PRECONDITION",
        f"{rendering} is needed by {made.name}",
    )
    asker.send(f"{TRAINING}/CancelFineTuningJob", {"name": made.name})
    deleted(asker, f"{DATA}/DeleteRendering", rendering)
    wanted = {"datasetVersion": VERSION, "model": BASE}
    request = {"parent": PARENT, "renderingId": "own-template", "rendering": wanted}
    again = asker.send(f"{DATA}/CreateRendering", request)
    assert again.uid != old.uid
    assert events(asker, f"{DATA}/WatchRendering", rendering) == [(1, "QUEUED")]
    lineage = {
        one.name: (one.uid, one.digest)
        for one in asker.send(f"{TRAINING}/GetFineTuningJob", {"name": made.name}).references
    }
    base = asker.send(f"{MODELS}/GetModel", {"name": BASE})
    assert lineage == {BASE: (base.uid, base.digest), rendering: (old.uid, old.digest)}
    _the_job_and_its_model_go(asker)


def _the_job_and_its_model_go(asker: Asker) -> None:
    model = f"{PARENT}/models/own-template"
    trained = asker.send(f"{TRAINING}/GetFineTuningJob", {"name": f"{PARENT}/fineTuningJobs/own-template"})
    tuned = asker.send(f"{MODELS}/GetModel", {"name": model})
    assert {one.name: one.uid for one in tuned.references}[trained.name] == trained.uid
    num_events = len(asker.send(f"{TRAINING}/ListFineTuningJobEvents", {"parent": trained.name}).events)
    assert num_events > 5
    asker.send(f"{TRAINING}/DeleteFineTuningJob", {"name": trained.name})
    again = {"baseModel": BASE, "rendering": f"{PARENT}/renderings/chat", "tunedModelId": "other"}
    request = {"parent": PARENT, "fineTuningJobId": "own-template", "fineTuningJob": again}
    made = asker.send(f"{TRAINING}/CreateFineTuningJob", request)
    assert made.uid != trained.uid
    assert events(asker, f"{TRAINING}/WatchFineTuningJob", made.name) == [(1, "QUEUED")]
    points = asker.send(f"{TRAINING}/ReadFineTuningJobMetrics", {"name": made.name}).points
    checkpoints = asker.send(f"{TRAINING}/ListCheckpoints", {"parent": made.name}).checkpoints
    assert (list(points), list(checkpoints)) == ([], []), "nothing of the former job"
    unchanged = asker.send(f"{MODELS}/GetModel", {"name": model})
    assert unchanged == tuned, "what was made by the deleted job stays, and says by which"
    asker.send(f"{MODELS}/DeleteModel", {"name": model})
    assert refusal(asker, f"{MODELS}/GetModel", {"name": model})[0] == "NOT_FOUND"


def registered_again(asker: Asker, name: str, source: Mapping[str, Any]) -> Any:
    """Register a base model under the name of a deleted one."""
    request = {"parent": PARENT, "modelId": name.rpartition("/")[2], "model": source}
    made = asker.send(f"{MODELS}/RegisterBaseModel", request)
    assert made.name == name
    assert events(asker, f"{MODELS}/WatchModel", name) == [(1, "QUEUED")], "nothing of the former model"
    return made


def test_a_job_still_says_which_model_it_tuned_when_that_ones_name_is_anothers(asker: Asker) -> None:
    get = {"name": f"{PARENT}/fineTuningJobs/outlived"}
    job = asker.send(f"{TRAINING}/GetFineTuningJob", get)
    tuned = asker.send(f"{MODELS}/GetModel", {"name": job.tuned_model})
    base = asker.send(f"{MODELS}/GetModel", {"name": BASE})
    asker.send(f"{MODELS}/DeleteModel", {"name": tuned.name})
    made = registered_again(asker, tuned.name, {"directory": base.directory})
    assert made.uid != tuned.uid
    again = asker.send(f"{TRAINING}/GetFineTuningJob", get)
    assert again == job
    lineage = {one.name: (one.uid, one.digest) for one in again.references}
    assert lineage[tuned.name] == (tuned.uid, tuned.digest)


@pytest.mark.parametrize(("name", "source"), [("broken", "directory"), ("nowhere", "hub")])
def test_a_base_model_that_nothing_needs_is_deleted_and_registered_again(
    asker: Asker, name: str, source: str
) -> None:
    get = {"name": f"{PARENT}/models/{name}"}
    old = asker.send(f"{MODELS}/GetModel", get)
    former = events(asker, f"{MODELS}/WatchModel", old.name)
    assert former[0] == (1, "QUEUED")
    assert former[-1][1] == "FAILED"
    asker.send(f"{MODELS}/DeleteModel", get)
    assert refusal(asker, f"{MODELS}/GetModel", get)[0] == "NOT_FOUND"
    told = plain(old)[source]
    made = registered_again(asker, old.name, {source: told})
    assert made.uid != old.uid
    assert not made.HasField("error")
    assert plain(made)[source] == told


def test_an_evaluation_is_deleted_and_made_again(asker: Asker) -> None:
    name = f"{PARENT}/evaluations/compared"
    old = asker.send(f"{EVALUATION}/GetEvaluation", {"name": name})
    assert asker.send(f"{EVALUATION}/ListPredictions", {"parent": name}).predictions
    asker.send(f"{EVALUATION}/DeleteEvaluation", {"name": name, "etag": old.etag})
    assert refusal(asker, f"{EVALUATION}/ListPredictions", {"parent": name})[0] == "NOT_FOUND"
    arms = [{"armId": "zero", "model": BASE}]
    request = {
        "parent": PARENT,
        "evaluationId": "compared",
        "evaluation": {"datasetVersion": VERSION, "arms": arms},
    }
    made = asker.send(f"{EVALUATION}/CreateEvaluation", request)
    assert made.uid != old.uid
    assert events(asker, f"{EVALUATION}/WatchEvaluation", name) == [(1, "QUEUED")]
    version = asker.send(f"{DATA}/GetDatasetVersion", {"name": VERSION})
    base = asker.send(f"{MODELS}/GetModel", {"name": BASE})
    assert {one.name: (one.uid, one.digest) for one in made.references} == {
        VERSION: (version.uid, version.digest),
        BASE: (base.uid, base.digest),
    }
