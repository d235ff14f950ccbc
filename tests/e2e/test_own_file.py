"""The path of a user's own file, typed at the command line as the README has it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.conftest import WAIT, Cluster, Shared

pytestmark = pytest.mark.e2e
ALPACA = Path(__file__).parents[3] / "shared" / "data" / "alpaca_en_demo.json"


def luthier(cluster: Cluster, *words: str) -> Any:
    """Run the client's command and return the JSON that it prints."""
    program = str(Path(sys.executable).with_name("luthier"))
    done = subprocess.run(
        [program, "--json", *words], env=cluster.environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(not ALPACA.exists(), reason="the Alpaca sample of 999 records is not beside the checkout")
def test_a_real_alpaca_file_goes_from_json_to_a_tuned_model(tuning: Shared, tmp_path: Path) -> None:
    cluster = tuning.cluster
    version = luthier(cluster, "datasets", "create", "--name", "alpaca", "--test", "0.1", str(ALPACA))
    assert version["state"] == "STATE_READY"
    assert version["sources"][0]["detected_format"] == "DATASET_FORMAT_ALPACA"
    counts = {one["split"]: int(one["num_records"]) for one in version["statistics"]["splits"]}
    duplicates = int(version["statistics"].get("num_duplicates", 0))
    assert sum(counts.values()) == 999 - duplicates
    assert 0.05 < counts["SPLIT_TEST"] / sum(counts.values()) < 0.15

    rendering = luthier(
        cluster, "renderings", "create", version["name"], "--model", "tiny", "--max-tokens", "400"
    )
    assert rendering["state"] == "STATE_READY"
    settings = [
        "--model",
        "tiny",
        "--rendering",
        rendering["name"],
        "--max-steps",
        "2",
        "--batch-tokens",
        "1024",
    ]
    plan = luthier(cluster, "jobs", "plan", *settings)
    assert int(plan["num_steps"]) == 2
    luthier(cluster, "jobs", "create", *settings, "--name", "own")
    with cluster.client() as client:
        tuned = client.jobs.wait("own", timeout_seconds=WAIT).tuned_model
    target = tmp_path / "adapter"
    program = str(Path(sys.executable).with_name("luthier"))
    subprocess.run([program, "models", "download", tuned, str(target)], env=cluster.environment(), check=True)
    assert (target / "adapter_config.json").exists()
