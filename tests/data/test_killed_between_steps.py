"""SIGKILL between every two steps of the life of some bytes: nothing needed is lost, and the disk comes back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("life", ["data", "training", "evaluation"])
def test_a_kill_before_any_step_loses_nothing_that_is_needed_and_leaves_nothing_else(
    life: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "tests.data.killed_life", str(tmp_path), life]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)[life]
    assert found["wrong"] == []
    # Every kind of step was met, and killed before, many a time. An upload becomes a blob by a link, what a worker
    # sends by being moved.
    assert found["steps"]["commit"] > 10
    kinds = {"rename", "unlink", "utime"} | ({"link"} if life == "data" else set())
    assert {kind for kind in kinds if found["steps"].get(kind, 0) > 0} == kinds
