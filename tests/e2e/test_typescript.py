"""The TypeScript client with real services and workers: its own tests, and the programs of its README."""

from __future__ import annotations

import re
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
SUITES = sorted(path.name.removesuffix(".test.ts") for path in (PACKAGE / "real").glob("*.test.ts"))
assert SUITES, f"no suite is in {PACKAGE / 'real'}: pytest would skip them all without a word"


@pytest.mark.parametrize("suite", SUITES)
def test_the_typescript_client_does_with_services_what_it_says(cluster: Cluster, suite: str) -> None:
    built = PACKAGE / "build" / "real" / f"{suite}.test.js"
    assert built.exists(), "the TypeScript client is not built: make typescript"
    done = subprocess.run(
        ["node", "--test", str(built)],
        env=cluster.environment(),
        cwd=PACKAGE,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr
    written = re.findall(r"^test\(", (PACKAGE / "real" / f"{suite}.test.ts").read_text(), re.MULTILINE)
    assert f"# pass {len(written)}\n" in done.stdout, done.stdout[-2000:]
