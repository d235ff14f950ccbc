"""The benchmark of small calls runs as a whole, with small numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "unary_calls.py"


def test_the_fast_run_compares_two_sides() -> None:
    sides = [f"--side={name}={sys.executable}" for name in ("before", "after")]
    command = [sys.executable, str(BENCHMARK), "--fast", *sides]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result) == {"GetFineTuningJob", "ListDatasets"}
    for by_side in result.values():
        assert list(by_side) == ["before", "after"]
        assert all(seen["service_cpu_ms"] >= 0 for seen in by_side.values())
