"""What a worker and all that it started hold, and the whole way with both kinds of worker in small."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import serving_memory
from serving_memory import APART, TOGETHER, Found, held_bytes, processes_of, summary_of

HOLDS = "import sys, time; held = bytearray(b'x' * (40 << 20)); print('held', flush=True); time.sleep(60)"
STARTS = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {HOLDS!r}])"


def test_what_is_held_is_that_of_all_that_a_process_started() -> None:
    with subprocess.Popen([sys.executable, "-c", STARTS], stdout=subprocess.PIPE, text=True) as outer:
        assert outer.stdout is not None
        assert outer.stdout.readline() == "held\n"
        found = processes_of(outer.pid)
        assert found[0] == outer.pid
        assert len(found) == 2
        assert held_bytes(found[1]) > 40 << 20 > held_bytes(outer.pid) > 1 << 20
        outer.kill()
        subprocess.run(["kill", str(found[1])], check=True)
    deadline = time.monotonic() + 10.0
    while held_bytes(found[1]):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_summary_has_the_medians_of_both() -> None:
    apart = [
        Found(held_bytes=held, worker_bytes=100, first_token_seconds=[0.2, 0.4]) for held in (700, 900, 650)
    ]
    together = [Found(held_bytes=560, worker_bytes=500, first_token_seconds=[0.1, 0.3])]
    found = summary_of({APART: apart, TOGETHER: together})
    assert (found["memory_ratio"], found["first_token_ratio"]) == (1.25, 1.5)
    assert found[APART]["worker_bytes"] == 100
    assert found[TOGETHER]["held_bytes"] == 560


@pytest.mark.parametrize("rounds", ["0", "-1"])
def test_no_rounds_are_refused(rounds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        serving_memory.main(["--rounds", rounds])
    assert f"--rounds must be at least 1, got {rounds}" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_way_in_small(capsys: pytest.CaptureFixture[str]) -> None:
    assert serving_memory.main(["--fast"]) == 0
    told = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert told[APART]["worker_bytes"] < told[APART]["held_bytes"], "the driver has no model"
    assert told[TOGETHER]["worker_bytes"] > 200 << 20, "torch is in the worker"
    assert told[APART]["worker_bytes"] < told[TOGETHER]["worker_bytes"] / 2
    assert 0.5 < told["memory_ratio"] < 3.0
