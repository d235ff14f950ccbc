"""Processes under limits: what is taken from them, what ends them, and that they end with their parent."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from luthier.errors import Cancelled, InvalidArgument, Reason, Unavailable
from luthier.work.limited import LimitedProcess, LimitReached, ProcessBroken, ProcessKilled, spawned
from luthier.work.limited_child import Limits
from luthier.work.limited_pool import LimitedPool

PROBE = "tests.work.limited_probe"
LIMITS = Limits(cpu_seconds=1, memory_bytes=256 << 20, wall_seconds=20.0)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_for(condition: Callable[[], bool], seconds: float) -> float:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds
        time.sleep(0.01)
    return time.monotonic() - began


@pytest.fixture
def process() -> Iterator[LimitedProcess]:
    with closing(spawned(PROBE, LIMITS)) as started:
        yield started


def test_call_carries_any_text_and_keeps_the_process(process: LimitedProcess) -> None:
    texts = ["", "héllo \ud800 \U0001f600", "x" * 3_000_000]
    answers = [process.call({"do": "echo", "text": text}) for text in texts]
    assert [answer["said"] for answer in answers] == texts
    assert len({answer["pid"] for answer in answers}) == 1
    process.call({"do": "print"})
    with pytest.raises(InvalidArgument, match="not this") as caught:
        process.call({"do": "refuse"})
    assert (caught.value.reason, caught.value.metadata) == (Reason.TEMPLATE_INVALID, {"line": "3"})
    assert process.call({"do": "echo", "text": "still here"})["pid"] == answers[0]["pid"]


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"do": "spin"}, "1 s of CPU time"),
        ({"do": "allocate", "size_bytes": 1 << 30}, "256 MiB of memory"),
        ({"do": "answer", "size_bytes": 65 << 20}, "64 MiB for its answer"),
    ],
)
def test_call_that_takes_too_much_ends_the_process(
    process: LimitedProcess, request_: dict[str, object], said: str
) -> None:
    with pytest.raises(LimitReached, match=said):
        process.call(request_)
    wait_for(lambda: not process.alive, 5)


def test_call_that_takes_too_long_ends_the_process_unless_it_goes_on() -> None:
    with closing(spawned(PROBE, replace(LIMITS, wall_seconds=1.0))) as process:
        heard: list[int] = []
        process.call(
            {"do": "notes", "count": 4, "seconds": 0.5}, heard=lambda note: heard.append(note["number"])
        )
        assert heard == [0, 1, 2, 3]
        with pytest.raises(LimitReached, match=r"^1 s$"):
            process.call({"do": "sleep", "seconds": 60})
        assert not process.alive


def test_a_note_gives_cpu_time_anew_less_what_counts_as_spent() -> None:
    with closing(spawned(PROBE, replace(LIMITS, cpu_seconds=9))) as process:
        for spent_seconds, least in ((0.0, 9), (2.5, 6.5), (8.0, 1)):
            left = process.call({"do": "tell_limit", "spent_seconds": spent_seconds})
            assert 8.9 < left["before"] <= 10
            assert least - 0.1 < left["behind"] <= least + 1  # the kernel counts whole seconds


def test_call_that_fails_unforeseen_says_how() -> None:
    for request, said in (({"do": "panic"}, "Panic: no entry found"), ({"do": "exit"}, "code 7")):
        with closing(spawned(PROBE, LIMITS)) as process:
            with pytest.raises(ProcessBroken, match=said):
                process.call(request)
            assert not process.alive


def test_call_notices_that_the_process_was_killed(process: LimitedProcess) -> None:
    pid = process.call({"do": "echo", "text": ""})["pid"]
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ProcessKilled):
        process.call({"do": "echo", "text": ""})


def test_call_is_given_up_at_once_when_nobody_wants_it(process: LimitedProcess) -> None:
    process.call({"do": "echo", "text": ""})

    def check() -> None:
        raise Unavailable("the worker shuts down", reason=Reason.SHUTTING_DOWN)

    began = time.monotonic()
    with pytest.raises(Unavailable, match="shuts down"):
        process.call({"do": "sleep", "seconds": 60}, check=check)
    assert time.monotonic() - began < 2
    assert not process.alive


def test_process_has_no_environment_no_network_and_writes_no_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LUTHIER_SECRET", "key")
    with closing(spawned(PROBE, LIMITS)) as process, socket.create_server(("127.0.0.1", 0)) as server:
        names = set(process.call({"do": "environment"}))
        assert names - {"LC_CTYPE", "PWD"} == {
            "PYTHONPATH",
            "TOKENIZERS_PARALLELISM",
            "OMP_NUM_THREADS",
            "ARROW_DEFAULT_MEMORY_POOL",
        }
        with pytest.raises(ProcessBroken, match=r"OSError|Connection|Network"):
            process.call({"do": "connect", "port": server.getsockname()[1]})
    with closing(spawned(PROBE, LIMITS)) as process:
        with pytest.raises(ProcessBroken):
            process.call({"do": "write", "path": str(tmp_path / "file")})
        assert (tmp_path / "file").read_text() == ""


def test_process_ends_within_a_second_of_its_parents_kill(tmp_path: Path) -> None:
    """Busy, so that it does not notice the end of its connection by itself."""
    program = (
        "import sys\n"
        "from luthier.work.limited import spawned\n"
        "from luthier.work.limited_child import Limits\n"
        f"process = spawned({PROBE!r}, Limits())\n"
        "print(process.call({'do': 'echo', 'text': ''})['pid'], flush=True)\n"
        "process.call({'do': 'spin'})\n"
    )
    environment = {"PYTHONPATH": ":".join(path for path in sys.path if path)}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert not gone(child)
        parent.kill()
        parent.wait()
        assert wait_for(lambda: gone(child), 5) < 1


def test_process_outlives_the_thread_that_started_it() -> None:
    started: list[LimitedProcess] = []
    thread = threading.Thread(target=lambda: started.append(spawned(PROBE, LIMITS)))
    thread.start()
    thread.join()
    with closing(started[0]) as process:
        for text in ("a", "b"):
            assert process.call({"do": "echo", "text": text})["said"] == text


def test_what_a_failed_request_had_taken_is_there_for_the_next(process: LimitedProcess) -> None:
    """A failure holds the frames that it passed, and they hold it: no count of references lets go of them."""
    first = process.call({"do": "echo", "text": ""})["pid"]
    for _ in range(3):
        with pytest.raises(InvalidArgument, match="full"):
            process.call({"do": "fail_with", "size_bytes": 150 << 20})
        assert process.call({"do": "allocate", "size_bytes": 200 << 20}) == {"size": 200 << 20}
    assert process.call({"do": "echo", "text": ""})["pid"] == first


@pytest.fixture
def pool() -> Iterator[LimitedPool]:
    with closing(LimitedPool(PROBE, replace(LIMITS, cpu_seconds=30), size=3)) as made:
        yield made


def in_threads(work: Callable[[], object], count: int) -> list[threading.Thread]:
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads


def test_pool_keeps_a_process_for_every_other_key(pool: LimitedPool) -> None:
    """Many requests of one key that hang leave one process; when given up they leave all."""
    stopping = threading.Event()
    ends: list[Exception] = []

    def check() -> None:
        if stopping.is_set():
            raise Cancelled("stopped")

    def hang() -> None:
        try:
            pool.call("slow", {"do": "sleep", "seconds": 600}, check=check)
        except Cancelled as error:
            ends.append(error)

    threads = in_threads(hang, 6)
    time.sleep(1)
    for text in ("a", "b", "c"):
        assert pool.call("quick", {"do": "echo", "text": text})["said"] == text
    stopping.set()
    began = time.monotonic()
    for thread in threads:
        thread.join(10)
    assert time.monotonic() - began < 3
    assert len(ends) == 6
    assert pool.call("slow", {"do": "echo", "text": "d"})["said"] == "d"


def test_pool_starts_anew_after_a_process_that_died(pool: LimitedPool) -> None:
    with pytest.raises(LimitReached):
        pool.call("a", {"do": "allocate", "size_bytes": 1 << 30})
    first = pool.call("a", {"do": "echo", "text": ""})["pid"]
    os.kill(first, signal.SIGKILL)
    second = pool.call("a", {"do": "echo", "text": ""})["pid"]
    assert second != first
    assert pool.call("a", {"do": "echo", "text": ""})["pid"] == second


def test_pool_has_nobody_refused_for_the_memory_that_somebody_keeps(pool: LimitedPool) -> None:
    keeping = pool.call("a", {"do": "keep", "size_bytes": 100 << 20})["pid"]
    assert pool.call("b", {"do": "echo", "text": ""})["pid"] == keeping
    # What is kept is more than half now: this is the last that the process answers.
    assert pool.call("a", {"do": "keep", "size_bytes": 100 << 20})["pid"] == keeping
    assert gone(keeping)
    assert pool.call("b", {"do": "allocate", "size_bytes": 200 << 20}) == {"size": 200 << 20}


def test_pool_that_is_closed_ends_its_processes_and_refuses() -> None:
    pool = LimitedPool(PROBE, LIMITS)
    pid = pool.call("a", {"do": "echo", "text": ""})["pid"]
    pool.close()
    assert gone(pid)
    with pytest.raises(Unavailable, match="shuts down"):
        pool.call("a", {"do": "echo", "text": ""})
