"""A child that stays: many ask it at once, what it says reaches who asked, and its end is told to all who wait."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tests.work.test_children import PATIENCE, Wanting, runs, until

from luthier.errors import Cancelled, InvalidArgument, LuthierError, ResourceExhausted, Unavailable
from luthier.work import standing as standing_module
from luthier.work.child import Message
from luthier.work.child_watch import Watch
from luthier.work.children import Children, Program
from luthier.work.standing import Requests, Standing
from luthier.work.standing_child import Part, Request, Stop

# Does what it is asked, with nothing imported that takes long.
CHILD = """
import ctypes, itertools, os, signal, threading, time
from luthier.errors import InvalidArgument
from luthier.work.child import serve
from luthier.work.standing_child import Part, Speaker, answer_requests

class Counting:
    def __init__(self, speaker):
        self.speaker = speaker
        self.stopped = set()
        self.held = set()

    def ask(self, request):
        number, name, arguments = request.number, request.name, request.arguments
        if name == "echo":
            self.speaker.say([Part(number, arguments)])
        if name == "bad":
            self.speaker.say([Part(number, error=InvalidArgument("no such thing"))])
        if name == "count":
            threading.Thread(target=self.count, args=(number,), daemon=True).start()
        if name == "keep":
            self.held.add(number)
        if name == "crash":
            ctypes.string_at(0)
        if name == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "hold":
            ctypes.PyDLL(None).sleep(600)

    def stop(self, number):
        self.stopped.add(number)

    def count(self, number):
        for value in itertools.count():
            if number in self.stopped:
                self.speaker.step([Part(number, "stopped")])
                return
            self.speaker.step([Part(number, value, is_last=False)])
            time.sleep(0.001)

def prepare(setup):
    return work

def work(line, order):
    if order == "bad":
        raise InvalidArgument("no such model")
    speaker = Speaker(line)
    speaker.begun(os.getpid())
    counting = Counting(speaker)
    def idle():
        while True:
            speaker.idle()
            time.sleep(0.01)
    threading.Thread(target=idle, daemon=True).start()
    answer_requests(line, counting)

serve(prepare)
"""


class Killing:
    """Counts the kills for want of memory that there are said to have been."""

    def __init__(self) -> None:
        self.counted = 0

    def __call__(self) -> int:
        return self.counted


@pytest.fixture
def kills() -> Killing:
    return Killing()


@pytest.fixture
def children(tmp_path: Path, kills: Killing) -> Iterator[Children]:
    (tmp_path / "child.py").write_text(CHILD)
    with Children(Program(command=("-P", str(tmp_path / "child.py"))), PATIENCE, kills) as found:
        yield found


@pytest.fixture
def standing(children: Children) -> Iterator[Standing]:
    with closing(Standing(children, "order")) as found:
        yield found


def pid_of(standing: Standing) -> int:
    pid: int = standing.begun()
    return pid


def ends(standing: Standing, name: str) -> LuthierError:
    """What is raised to who asks for the end."""
    with pytest.raises(LuthierError) as caught:
        standing.requests.call(name)
    return caught.value


def test_many_ask_at_once_and_each_hears_its_own(standing: Standing) -> None:
    standing.begun()
    with (
        closing(standing.requests.stream("count")) as counted,
        ThreadPoolExecutor(8) as threads,
    ):
        assert next(counted) == 0
        wanted = [(number, "x" * number) for number in range(200)]
        assert list(threads.map(lambda one: standing.requests.call("echo", one), wanted)) == wanted
        assert [next(counted) for _ in range(50)] == list(range(1, 51))
    assert standing.requests.num_steps >= 50


def test_what_a_child_refuses_is_raised_to_the_one_who_asked(standing: Standing) -> None:
    with closing(standing.requests.stream("count")) as counted:
        next(counted)
        with pytest.raises(InvalidArgument, match="no such thing"):
            standing.requests.call("bad")
        next(counted)
    assert standing.requests.ended is None


def test_a_request_that_nobody_hears_any_more_is_stopped_and_let_go_of(standing: Standing) -> None:
    counted = standing.requests.stream("count")
    next(counted)
    counted.close()
    until(lambda: not standing.requests._stopped)
    with (
        pytest.raises(Cancelled),
        closing(standing.requests.stream("count", (), Wanting(lambda: True).heed)) as own,
    ):
        next(own)
    until(lambda: standing.requests.unheard_seconds() == 0.0)
    assert standing.requests.call("echo", (1,)) == (1,)


def test_a_child_that_cannot_begin_says_why(children: Children) -> None:
    with closing(Standing(children, "bad")) as standing:
        with pytest.raises(InvalidArgument, match="no such model"):
            standing.begun()
        with pytest.raises(InvalidArgument, match="no such model"):
            standing.requests.call("echo")


@pytest.mark.parametrize(
    ("name", "said"), [("crash", "was ended by SIGSEGV"), ("killed", "was ended by SIGKILL, from outside")]
)
def test_the_end_of_a_child_is_told_to_all_who_wait_and_the_next_one_answers(
    children: Children, standing: Standing, name: str, said: str
) -> None:
    pid = pid_of(standing)
    lines: list[str] = []
    with (
        standing.reporting(lambda text, severity: lines.append(f"{severity} {text}")),
        closing(standing.requests.stream("count")) as counted,
    ):
        next(counted)
        with ThreadPoolExecutor(2) as threads:
            kept = threads.submit(standing.requests.call, "keep")
            error = ends(standing, name)
            others = [kept.exception(30)]
            with pytest.raises(Unavailable) as caught:
                list(counted)
        others.append(caught.value)
    for one in (error, *others):
        assert isinstance(one, Unavailable)
        assert one.reason == "CRASHED"
        assert said in one.message
    assert len({id(one) for one in (error, *others)}) == 3, "a traceback belongs to one thread"
    assert len(
        [line for line in lines if line.startswith("WARNING the process that did the work crashed:\nFatal")]
    ) == (name == "crash")
    assert not runs(pid)
    assert ends(standing, "echo").reason == "CRASHED", "it stays ended"
    with closing(Standing(children, "order")) as other:
        assert other.requests.call("echo", (2,)) == (2,)


def test_a_kill_while_the_kernel_counts_one_for_want_of_memory_is_told_so(
    standing: Standing, kills: Killing
) -> None:
    pid = pid_of(standing)
    kills.counted += 1
    os.kill(pid, signal.SIGKILL)
    error = ends(standing, "keep")
    assert isinstance(error, ResourceExhausted)
    assert error.reason == "OUT_OF_MEMORY"


def test_a_child_that_has_nothing_to_do_may_stand_still(standing: Standing) -> None:
    pid = pid_of(standing)
    time.sleep(2 * PATIENCE.still_seconds)
    assert runs(pid)
    assert standing.requests.call("echo", (3,)) == (3,)


def test_time_without_work_is_no_part_of_a_step(standing: Standing, monkeypatch: pytest.MonkeyPatch) -> None:
    watches: list[Watch] = []
    heard = Watch.heard

    def seen(watch: Watch, message: Message) -> None:
        watches.append(watch)
        heard(watch, message)

    monkeypatch.setattr(Watch, "heard", seen)
    for _ in range(2):
        with closing(standing.requests.stream("count")) as counted:
            next(counted)
        time.sleep(2.0)
    assert max(watches[-1]._step_seconds) < 1.0


def test_a_child_that_hangs_is_ended_and_says_where(standing: Standing, tmp_path: Path) -> None:
    pid = pid_of(standing)
    lines: list[str] = []
    with standing.reporting(lambda text, severity: lines.append(f"{severity} {text}")):
        error = ends(standing, "hold")
    assert error.reason == "STALLED"
    assert "it stood still for 1.5 s" in error.message
    (line,) = lines
    assert line.startswith("WARNING the process that does the work hangs:\n")
    assert "in ask" in line
    assert not runs(pid)


def test_a_child_that_does_not_let_go_is_ended_within_ten_seconds_and_says_where(standing: Standing) -> None:
    pid = pid_of(standing)
    lines: list[str] = []
    with standing.reporting(lambda text, severity: lines.append(text)):
        kept = standing.requests.stream("keep", (), Wanting(lambda: True).heed)
        with pytest.raises(Cancelled):
            next(kept)
        began = time.monotonic()
        until(lambda: not runs(pid), 10.0)
        assert time.monotonic() - began >= standing_module.STOP_SECONDS
        until(lambda: standing.requests.ended is not None)
    assert standing.requests.ended is not None
    assert standing.requests.ended.reason == "STALLED"
    assert "it was told to stop what it was asked for, and did not for" in standing.requests.ended.message
    assert any("in ask" in line or "in answer_requests" in line for line in lines)


def test_what_was_stopped_within_a_long_step_has_time_until_the_next_one_ends() -> None:
    """Who came later waits for the steps that follow: the child works, and is not to be ended for who went."""
    asked: list[Any] = []
    requests = Requests(asked.append)
    before, gone = requests.stream("before"), requests.stream("gone", (), Wanting(lambda: True).heed)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(next, before)
        until(lambda: len(asked) == 1)
        with pytest.raises(Cancelled):
            next(gone)
        assert [type(one) for one in asked] == [Request, Request, Stop]
        assert requests.unheard_seconds() == 0.0, "somebody waits for what was asked before"
        requests.step([Part(1, "done")])
        assert waiting.result(10) == "done"
    assert requests.unheard_seconds() == 0.0, "the step that it was at has ended"
    requests.step([])
    assert requests.unheard_seconds() == 0.0
    requests.step([])
    assert requests.unheard_seconds() > 0.0, "three have ended since, and it is still there"
    requests.step([Part(2)])
    assert requests.unheard_seconds() == 0.0


def test_a_child_is_not_ended_for_who_went_while_somebody_waits_for_what_was_asked_later() -> None:
    requests = Requests(lambda _: None)
    with pytest.raises(Cancelled):
        next(requests.stream("gone", (), Wanting(lambda: True).heed))
    assert requests.unheard_seconds() > 0.0
    later = requests.stream("later")
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(next, later)
        until(lambda: len(requests._open) == 1)
        meanwhile = requests.unheard_seconds()
        requests.say([Part(2, "done")])
        assert waiting.result(10) == "done"
    assert meanwhile == 0.0
    assert requests.unheard_seconds() > 0.0, "nobody waits any more, and it is in that very step still"


def test_a_child_that_others_wait_for_is_not_ended_for_one_who_goes(
    standing: Standing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standing_module, "STOP_SECONDS", 0.5)
    pid = pid_of(standing)
    with closing(standing.requests.stream("count")) as counted:
        next(counted)
        kept = standing.requests.stream("keep", (), Wanting(lambda: True).heed)
        with pytest.raises(Cancelled):
            next(kept)
        began = time.monotonic()
        while time.monotonic() - began < 2.0:
            next(counted)
        assert runs(pid)
    until(lambda: not runs(pid))


def test_closing_ends_a_child_whatever_it_does_and_tells_who_waits(standing: Standing) -> None:
    pid = pid_of(standing)
    with ThreadPoolExecutor(2) as threads:
        holding = threads.submit(standing.requests.call, "hold")
        time.sleep(0.3)
        began = time.monotonic()
        standing.close()
        assert time.monotonic() - began < 1.0
        error = holding.exception(10)
    assert isinstance(error, Unavailable)
    assert error.reason == "SHUTTING_DOWN"
    assert not runs(pid)


def test_who_asks_a_child_that_reads_nothing_still_hears_that_it_may_go(standing: Standing) -> None:
    pid = pid_of(standing)
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    large = ("x" * (8 << 20),)
    with pytest.raises(Cancelled):
        standing.requests.call("echo", large, Wanting(lambda: time.monotonic() - began > 0.3).heed)
    assert time.monotonic() - began < 1.0
    until(lambda: standing.requests.ended is not None, 10.0)
    assert not runs(pid)
    assert not [one for one in threading.enumerate() if one.name == "standing-out"]
