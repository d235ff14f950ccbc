"""What the command line prints of each kind of resource is what it takes, against the services themselves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.conftest import WAIT, Cluster, Shared, job

from luthier.v1.evaluation_pb2 import Evaluation, EvaluationArm

pytestmark = pytest.mark.e2e
# What the service writes anew for each resource.
_ITS_OWN = {
    "name",
    "uid",
    "references",
    "create_time",
    "start_time",
    "end_time",
    "update_time",
    "etag",
    "state",
    "progress",
    "latest_metrics",
    "num_attempts",
    "run_record",
    "tuned_model",
    "tuned_model_id",
}


def luthier(cluster: Cluster, *words: str) -> Any:
    """Run the client's command and return the JSON that it prints."""
    program = str(Path(sys.executable).with_name("luthier"))
    done = subprocess.run(
        [program, "--json", *words], env=cluster.environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def again(cluster: Cluster, folder: Path, group: str, name: str, *words: str) -> tuple[Any, Any]:
    """Show a resource, create another one from what was shown; returns both as they are shown."""
    shown = luthier(cluster, group, "show", name)
    path = folder / f"{group}.json"
    path.write_text(json.dumps(shown, indent=2))
    return shown, luthier(cluster, group, "create", "-f", str(path), *words)


def asked(shown: dict[str, Any]) -> dict[str, Any]:
    """What of a shown resource its caller decided, and what follows from that."""
    return {key: value for key, value in shown.items() if key not in _ITS_OWN}


def test_every_resource_is_made_again_from_what_is_printed(tuning: Shared, tmp_path: Path) -> None:
    cluster = tuning.cluster
    with cluster.client() as client:
        rendering = client.renderings.get(tuning.rendering)
        client.jobs.create(job(rendering.name, 1, labels={"team": "nlp"}), job_id="file-one")
        tuned = client.jobs.wait("file-one", timeout_seconds=WAIT).tuned_model
        arms = [
            EvaluationArm(arm_id="base", model="tiny", num_shots=2),
            EvaluationArm(arm_id="tuned", model=tuned),
        ]
        evaluation = Evaluation(dataset_version=rendering.dataset_version, arms=arms, seed=7)
        client.evaluations.create(evaluation, evaluation_id="file-one")

    version, other = again(cluster, tmp_path, "datasets", rendering.dataset_version, "--name", "file-more")
    assert asked(other) == asked(version)
    assert other["digest"] == version["digest"]
    shown, other = again(cluster, tmp_path, "renderings", rendering.name, "--name", "file-two")
    assert asked(other) == asked(shown)
    shown, other = again(cluster, tmp_path, "jobs", "file-one", "--name", "file-two")
    assert asked(other) == asked(shown)
    assert (shown["tuned_model_id"], other["tuned_model_id"]) == ("file-one", "file-two")
    with cluster.client() as client:
        assert client.jobs.wait("file-two", timeout_seconds=WAIT).tuned_model.endswith("/file-two")
    shown, other = again(cluster, tmp_path, "evaluations", "file-one", "--name", "file-two")
    assert asked(other) == asked(shown)
