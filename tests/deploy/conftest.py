"""Debian's Prometheus: its promtool checks what is written for it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

Promtool = Callable[[Sequence[str | Path], str], str]


@pytest.fixture(scope="session")
def promtool() -> Promtool:
    """Runs promtool, with a text on its standard input; fails with what it says."""
    program = shutil.which("promtool")
    if program is None:
        pytest.fail("promtool is missing: bash tests/debian.sh installs what the tests need of Debian")

    def run(arguments: Sequence[str | Path], text: str = "") -> str:
        command = [program, *map(str, arguments)]
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
        # Findings of `check metrics` are on the standard error, with exit code 3.
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run
