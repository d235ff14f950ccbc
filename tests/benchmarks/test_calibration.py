"""What plans say of memory and time holds for real runs of a small model, each in a process of its own."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import calibration
import devices_plan
import pytest
from calibration import CONFIGURATIONS, Configuration, Found, summary_of

# How much memory glibc leaves unused differs by processor and by what else runs: of 120 MiB that are planned with FULL
# and tiles, 111 to 138 were held on busy machines.
MEMORY_ERROR = 0.15
MEMORY_SPARED = 0.25
TIME_ERROR = 0.4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibration")
    calibration.make_model(folder)
    return folder


def assert_memory_holds(found: Found) -> None:
    """A run must not take more than it was told; what a plan says too much only refuses early."""
    taken_more = found.memory / found.expected_memory - 1
    assert -MEMORY_SPARED <= taken_more <= MEMORY_ERROR, asdict(found)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=lambda one: one.name)
def test_a_plan_holds_for_a_real_run(model: Path, configuration: Configuration) -> None:
    found = calibration.measured(configuration, model)
    assert found.memory > 100 << 20, "libraries are not what is measured"
    assert_memory_holds(found)
    assert found.time_error <= TIME_ERROR, asdict(found)


def test_a_run_that_keeps_its_inputs_alone_takes_what_the_plan_says(model: Path) -> None:
    """The one of all configurations that is quick enough for every day; time is not looked at."""
    (configuration,) = [one for one in CONFIGURATIONS if one.name == "adapter, long rows, FULL"]
    found = calibration.measured(replace(configuration, row_tokens=64), model)
    assert_memory_holds(found)
    assert found.expected_seconds > 0 < found.seconds


def test_a_summary_has_the_largest_errors() -> None:
    def found(name: str, memory: int, seconds: float) -> Found:
        return Found(
            name=name,
            memory=memory,
            expected_memory=100,
            seconds=seconds,
            expected_seconds=1.0,
            planned_seconds=2.0,
            runtime=1,
            operations=1.0,
            trained_head=1.0,
            bytes=1.0,
        )

    names = [one.name for one in CONFIGURATIONS]
    every = [found(name, 100, 1.0) for name in names]
    every[names.index("adapter, long rows, FULL")] = found("adapter, long rows, FULL", 80, 1.25)
    told = summary_of(every)
    assert told["plan_memory_error"] == pytest.approx(0.25)
    assert told["plan_time_error"] == pytest.approx(0.2)
    assert told["plan_told_time_error"] == pytest.approx(1.0), (
        "what the plan tells is no better for rates of the moment"
    )
    assert told["full_memory_ratio"] == pytest.approx(0.8)
    assert told["full_time_ratio"] == pytest.approx(1.25)


def test_of_several_runs_the_worst_memory_and_the_usual_time_count() -> None:
    made = Found(
        name="x",
        memory=100,
        expected_memory=100,
        seconds=1.0,
        expected_seconds=1.0,
        planned_seconds=1.0,
        runtime=1,
        operations=1.0,
        trained_head=1.0,
        bytes=1.0,
    )
    runs = [made, replace(made, seconds=4.0), replace(made, memory=80, seconds=2.0, expected_seconds=1.5)]
    assert devices_plan.middle(runs) == replace(made, memory=80, seconds=2.0, expected_seconds=1.5)
    assert devices_plan.middle(runs[:2]) == runs[1], "of two the worse one"


def test_an_unknown_configuration_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ended with code"):
        calibration.measured(Configuration(name="x", kept="NOTHING"), tmp_path)
