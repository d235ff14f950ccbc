"""The TypeScript client with real services and workers: its own tests, and the programs of its README."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from tests.e2e.conftest import Cluster

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.long,
    pytest.mark.skipif(shutil.which("npm") is None, reason="Node is not installed"),
]

PACKAGE = Path(__file__).parents[2] / "clients" / "typescript"


def test_the_typescript_client_does_with_services_what_it_says(cluster: Cluster) -> None:
    suites = sorted(str(path) for path in (PACKAGE / "build" / "real").glob("*.test.js"))
    assert len(suites) == 2, "the TypeScript client is not built: make typescript"
    done = subprocess.run(
        ["node", "--test", "--test-concurrency=1", *suites],
        env=cluster.environment(),
        cwd=PACKAGE,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr
    assert "# pass 12" in done.stdout, done.stdout[-2000:]
