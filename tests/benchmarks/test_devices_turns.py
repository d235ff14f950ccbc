"""Real processes take turns: each works while the other is stopped, and what it waited is not counted."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import devices_turns
import pytest
from devices_turns import Side, take_turns

_STEP_SECONDS = 0.05
# A step is so much time of a processor: who is stopped has none.
_WORK = """
import os, sys, time
for step in range(int(sys.argv[1])):
    until = time.process_time() + float(sys.argv[2])
    while time.process_time() < until:
        pass
    print(os.getpid(), time.time(), flush=True)
"""


def worker(name: str, steps: int, seconds: float, said: list[tuple[str, float]]) -> Side:
    """Return a side of one process; what it said and when goes into `said`."""

    def run(heard: Callable[[], None]) -> None:
        command = [sys.executable, "-S", "-c", _WORK, str(steps), str(seconds)]
        with subprocess.Popen(command, env=dict(side.environment), stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            for line in process.stdout:
                said.append((name, float(line.split()[1])))
                heard()
        assert process.returncode == 0

    side = Side(name=name, run=run)
    return side


def test_each_has_the_machine_for_a_step_and_its_waits_do_not_count() -> None:
    said: list[tuple[str, float]] = []
    slow, quick = worker("slow", 10, 3 * _STEP_SECONDS, said), worker("quick", 10, _STEP_SECONDS, said)
    began = time.perf_counter()
    take_turns(slow, quick)
    took = time.perf_counter() - began
    assert [name for name, _ in said[:8]] == ["slow"] * 2 + ["quick"] * 2 + ["slow", "quick"] * 2, (
        "warm, then in turns"
    )
    assert len(slow.seconds) == len(quick.seconds) >= 7
    # Had both counted the other's turns as well, it would be nearly twice as long; so it is on any machine.
    assert sum(slow.seconds) + sum(quick.seconds) < took
    assert min(slow.seconds) > 2 * _STEP_SECONDS, "a step takes what it takes of a processor"
    assert len(said) == 20, "both came to their ends"


def test_a_side_that_fails_ends_the_other_and_says_why() -> None:
    said: list[tuple[str, float]] = []

    def fail(heard: Callable[[], None]) -> None:
        raise ValueError("no such model")

    began = time.monotonic()
    with pytest.raises(ValueError, match="no such model"):
        take_turns(worker("good", 6, _STEP_SECONDS, said), Side(name="bad", run=fail))
    assert len(said) == 6, "who was stopped was let go"
    assert time.monotonic() - began < 60


def test_one_that_does_not_end_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices_turns, "_LONGEST_SECONDS", 0.5)
    said: list[tuple[str, float]] = []
    with pytest.raises(TimeoutError, match=r"the one must end within 0\.5 s"):
        take_turns(worker("one", 4, 1.0, said), worker("two", 4, 1.0, said))


def test_processes_of_others_are_left_alone(tmp_path: Path) -> None:
    one, other = Side(name="one", run=lambda _: None), Side(name="other", run=lambda _: None)
    with subprocess.Popen(["sleep", "60"], env=dict(other.environment)) as process:
        one.signal(signal.SIGKILL)
        assert process.poll() is None
        other.signal(signal.SIGKILL)
        assert process.wait() == -9
