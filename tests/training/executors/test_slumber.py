"""Threads that wait in every way, in a process of their own: which of them sleeps for nobody."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from luthier.training.executors.slumber import _IDLE

SCRIPT = """
import json, os, subprocess, sys, tempfile, threading, time
from pathlib import Path
from luthier.training.executors import pulse as pulses
from luthier.training.executors.pulse import Pulse, shown
from luthier.training.executors.slumber import Slumber

pulses.BEAT_SECONDS = 0.1
folder = Path(tempfile.mkdtemp())

def locked():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()

def ends_soon(work):
    until = time.monotonic() + 1
    while time.monotonic() < until:
        work()

def joins(work):
    other = threading.Thread(target=work, daemon=True)
    other.start()
    other.join()

def opens():
    os.open(folder / "fifo", os.O_WRONLY)

def bytes_read():
    return int(Path("/proc/self/io").read_text().split()[1])

own_bytes = bytes_read()
own_bytes = bytes_read() - own_bytes

def read_by(slumber, looks):
    before = bytes_read()
    for _ in range(looks):
        time.sleep(0.05)
        slumber.lasts()
    return bytes_read() - before - own_bytes

def looked_at(work):
    made = []
    def run():
        made.append(Slumber())
        work()
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while not made:
        time.sleep(0.01)
    [slumber] = made
    time.sleep(0.1)
    slumber.lasts()
    found = []
    for _ in range(3):
        time.sleep(0.15)
        found.append(slumber.lasts())
    return thread, found, slumber

def beating(wraps):
    path = folder / wraps
    def run():
        pulse = Pulse(path)
        with pulse.working():
            if wraps == "exchange":
                pulse.enter(1)
                locked()
            elif wraps == "asking":
                with pulse.asking():
                    locked()
            else:
                locked()
    threading.Thread(target=run, daemon=True).start()
    most, until = 0, time.monotonic() + (20 if wraps == "nothing" else 1)
    while most < 2 and time.monotonic() < until:
        time.sleep(0.05)
        most = max(most, shown(path).asleep if path.exists() else 0)
    return most

found = {}
# What comes to no end is looked at last: it would be there when others are looked at.
for name, work in {
    "naps": lambda: ends_soon(lambda: time.sleep(1)),
    "polls": lambda: ends_soon(lambda: threading.Event().wait(0.01)),
    "computes": lambda: ends_soon(lambda: sum(range(1000))),
    "joins what computes": lambda: joins(lambda: ends_soon(lambda: sum(range(1000)))),
}.items():
    thread, found[name], slumber = looked_at(work)
    if name == "computes":
        found["reads beside work"] = read_by(slumber, 3)
    thread.join()
child = subprocess.Popen(["sleep", "60"])
found["has a process"] = looked_at(locked)[1]
child.kill()
child.wait()
found["locks itself out"] = looked_at(locked)[1]
found["joins what is locked out"] = looked_at(lambda: joins(locked))[1]
found["beats"] = {wraps: beating(wraps) for wraps in ("nothing", "exchange", "asking")}
os.mkfifo(folder / "fifo")
_, found["joins what opens a file"], slumber = looked_at(lambda: joins(opens))
found["reads at first"] = read_by(slumber, 25)
found["reads then"] = read_by(slumber, 5)
print(json.dumps(found))
os._exit(0)
"""
"""Looks three times at each, and once at what a pulse shows."""

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/task").exists() or not Path("/proc/self/syscall").exists() or not _IDLE,
    reason="this kernel does not say what a thread waits in",
)


@pytest.fixture(scope="module")
def found() -> Mapping[str, list[bool]]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    said: Mapping[str, list[bool]] = json.loads(done.stdout)
    return said


@pytest.mark.parametrize("name", ["locks itself out", "joins what is locked out"])
def test_a_thread_that_nothing_will_wake_sleeps(found: Mapping[str, list[bool]], name: str) -> None:
    assert found[name] == [True, True, True]


@pytest.mark.parametrize(
    "name",
    ["naps", "polls", "computes", "joins what computes", "joins what opens a file", "has a process"],
)
def test_one_that_something_may_wake_does_not(found: Mapping[str, list[bool]], name: str) -> None:
    assert found[name] == [False, False, False]


def test_a_pulse_counts_no_sleep_in_which_others_or_the_driver_are_waited_for(
    found: Mapping[str, Mapping[str, int]],
) -> None:
    beats = found["beats"]
    assert beats["nothing"] >= 2
    assert (beats["exchange"], beats["asking"]) == (0, 0)


def test_looking_reads_nothing_beside_work_and_little_in_one_sleep(found: Mapping[str, int]) -> None:
    """Who watches the process takes what it reads for work."""
    # Counting them is reading too, some digits more each time.
    assert found["reads beside work"] < 50
    assert found["reads at first"] > 1000
    assert found["reads then"] < 50
