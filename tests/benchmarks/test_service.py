"""The benchmark of metrics and traces runs as a whole, with small numbers, and its sides are what they are called."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from service import SIDES, settings_of

from luthier.runtime.config import read
from luthier.runtime.tracing import TracesConfig

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("part", ["calls", "steps"])
def test_the_fast_run_compares_all_sides(part: str) -> None:
    command = [sys.executable, str(BENCHMARKS / "service.py"), "--fast", "--only", part]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    compared = result[part]["GetFineTuningJob"] if part == "calls" else result[part]
    assert list(compared) == list(SIDES[part])
    figure = "p50_ms" if part == "calls" else "tokens_per_second"
    assert all(side[figure]["median"] > 0 for side in compared.values())
    assert compared["off"][figure]["ratio"]["median"] == 1
    assert all(isinstance(said, bool) for said in result["as_promised"].values())
    assert {said.split()[0] for said in result["as_promised"]} == set(SIDES[part]) - {"off"}


def test_of_the_sides_with_traces_one_keeps_all_and_one_a_tenth() -> None:
    """Else a figure would be said to be what a share costs, and be what all of them cost."""
    shares = {
        side: read(TracesConfig, section="TRACES", environ=settings_of(side, "127.0.0.1:4317"))
        for side in ("metrics", "traces", "traces_tenth")
    }
    assert shares == {
        "metrics": TracesConfig(),
        "traces": TracesConfig(address="127.0.0.1:4317", share=1.0),
        "traces_tenth": TracesConfig(address="127.0.0.1:4317", share=0.1),
    }


def test_the_side_without_metrics_has_none() -> None:
    """Else it would be compared with itself."""
    program = """
import sitecustomize
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
registry = CollectorRegistry()
Counter("c", "c", registry=registry).inc()
Gauge("g", "g", registry=registry).set(5)
Histogram("h", "h", registry=registry).observe(1)
assert [registry.get_sample_value(name) for name in ("c_total", "g", "h_count")] == [0.0, 0.0, 0.0]
from luthier.runtime.call_metrics import CallMetrics
from luthier.storage.database import Database
from luthier.training.recipes.phases import PhaseClock
clock = PhaseClock()
clock.enter("compute")
assert clock.seconds() == {}
Database.observe(object(), object())
CallMetrics.handled(object(), object(), 1.0)
assert sitecustomize.applied == set(sitecustomize.PATCHES), sitecustomize.applied
"""
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS / "unmeasured")}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
