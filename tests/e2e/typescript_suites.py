"""Runs suites of the TypeScript client with services and workers that run."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "clients" / "typescript"
ELSEWHERE = ("learning-curve", "no-worker", "waiting")
"""Suites that test_learning_curve.py and test_no_worker.py run; test_typescript.py runs all others."""
SUITES = sorted(
    {path.name.removesuffix(".test.ts") for path in (PACKAGE / "real").glob("*.test.ts")} - set(ELSEWHERE)
)
assert SUITES, f"no suite is in {PACKAGE / 'real'}: pytest would skip them all without a word"
NEEDS_NODE = pytest.mark.skipif(shutil.which("npm") is None, reason="Node is not installed")
_SECONDS = 600.0


def run_suite(suite: str, environment: Mapping[str, str]) -> None:
    """Run a suite to its end: every test that is written in it must pass."""
    built = PACKAGE / "build" / "real" / f"{suite}.test.js"
    assert built.exists(), "the TypeScript client is not built: make typescript"
    done = subprocess.run(
        ["node", "--test", str(built)],
        env=dict(environment),
        cwd=PACKAGE,
        capture_output=True,
        text=True,
        check=False,
        timeout=_SECONDS,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr
    written = re.findall(r"^test\(", (PACKAGE / "real" / f"{suite}.test.ts").read_text(), re.MULTILINE)
    assert f"# pass {len(written)}\n" in done.stdout, done.stdout[-2000:]
