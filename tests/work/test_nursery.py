"""Children that are forked: what is shared, what must not be, and who outlives whom."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from tests.work.test_children import PATIENCE, Wanting, runs, until

from luthier.errors import Cancelled, InvalidArgument, Unavailable
from luthier.work import nursery as nursery_module
from luthier.work.child import NURSERY_NAME, Idle
from luthier.work.child_watch import Watch
from luthier.work.children import Children, Program
from luthier.work.nursery import Child, Send
from luthier.work.processes import Process

# Begins as its setup says, and does what an order says.
CHILD = """
import concurrent.futures, os, random, re, subprocess, sys, threading, time, types
from pathlib import Path
from luthier.errors import InvalidArgument
from luthier.work import forking
from luthier.work.child import serve

BUILT = []

def begin(setup):
    Path(setup["folder"], f"begun-{os.getpid()}").touch()
    BUILT.append(os.getpid())
    what = setup.get("begin")
    if what == "thread":
        forking._THREADS_END_SECONDS = 0.2
        threading.Thread(target=time.sleep, args=(600,), name="ticker", daemon=True).start()
    if what == "ending":
        pool = concurrent.futures.ThreadPoolExecutor(4)
        [pool.submit(time.sleep, 0.5) for _ in range(4)]
        pool.shutdown(wait=False)
    if what == "refuse":
        raise InvalidArgument("no such library")
    if what == "odd":
        raise KeyError("surprise")
    if what == "slow":
        time.sleep(600)
    if what == "device":
        forking._DEVICE = re.compile("/dev/zero")
        setup["opened"] = open("/dev/zero", "rb")
    if what == "torch":
        cuda = types.SimpleNamespace(is_initialized=lambda: True)
        sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)
    if what == "numpy":
        import numpy

def prepare(setup):
    if setup.get("prepare") == "slow":
        time.sleep(0.2)
    return work

def work(line, order):
    what, folder = order
    Path(folder, f"pid-{what}").write_text(str(os.getpid()))
    if what == "whose":
        names = [path.name for path in Path("/proc/self/fd").iterdir()]
        return BUILT, os.getpid(), os.getppid(), os.getpgid(0), len(names)
    if what == "draw":
        numpy = sys.modules["numpy"]
        return random.random(), float(numpy.random.random())
    if what == "wait":
        while not Path(folder, "go").exists():
            line.alive()
            time.sleep(0.02)
    if what == "leave":
        subprocess.Popen(["sleep", "600"])
        os._exit(3)
    return what

serve(prepare, begin)
"""

Made = Callable[..., Children]


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Made]:
    """Makes children that begin and prepare as said."""
    (tmp_path / "child.py").write_text(CHILD)
    all_made: list[Children] = []

    def make(**setup: str) -> Children:
        program = Program(
            command=("-P", str(tmp_path / "child.py")), setup={"folder": str(tmp_path), **setup}
        )
        all_made.append(Children(program, PATIENCE, lambda: 0))
        return all_made[-1]

    yield make
    for one in all_made:
        one.close()


def ran(children: Children, what: str, folder: Path, overseer: Any = None) -> Any:
    return children.run((what, str(folder)), {}, overseer or Wanting())


def begun(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("begun-")) for path in folder.glob("begun-*")]


def ours() -> set[int]:
    """Children of this process, those that have ended and are not reaped among them."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(words[1]) == os.getpid():
            found.add(int(path.parent.name))
    return found


def test_children_share_what_was_begun_once_and_are_the_drivers_own(made: Made, tmp_path: Path) -> None:
    children = made()
    built, *first = ran(children, "whose", tmp_path)
    again, *second = ran(children, "whose", tmp_path)
    assert built == again == begun(tmp_path), "begun once, by another process than either"
    for pid, parent, group, _ in (first, second):
        assert (parent, group) == (os.getpid(), pid)
    assert len({first[0], second[0], *built}) == 3
    assert first[3] == second[3], "no descriptor is left over from one child in the next"
    assert Path(f"/proc/{built[0]}/comm").read_text().strip() == NURSERY_NAME


def test_a_nursery_with_another_thread_is_refused_by_the_threads_name(made: Made, tmp_path: Path) -> None:
    children = made(begin="thread")
    with pytest.raises(Unavailable, match=r"must have one thread, it has 1 more: ticker$"):
        children.require_ready()
    with pytest.raises(Unavailable, match=r"must have one thread, it has 1 more: ticker$") as caught:
        ran(children, "fine", tmp_path)
    assert caught.value.reason == "CRASHED"


@pytest.mark.parametrize(("begin", "said"), [("device", "/dev/zero"), ("torch", r"torch\.cuda")])
def test_a_nursery_that_opened_a_device_is_refused_by_its_name(made: Made, begin: str, said: str) -> None:
    with pytest.raises(Unavailable, match=f"must have opened no device, it has {said}$"):
        made(begin=begin).require_ready()


def test_threads_that_are_about_to_end_are_waited_for(made: Made, tmp_path: Path) -> None:
    assert ran(made(begin="ending"), "fine", tmp_path) == "fine"


@pytest.mark.parametrize(
    ("begin", "kind", "said"),
    [("refuse", InvalidArgument, "no such library"), ("odd", Exception, "KeyError: 'surprise'")],
)
def test_what_goes_wrong_at_the_beginning_is_told(
    made: Made, begin: str, kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=said):
        made(begin=begin).require_ready()


def test_children_draw_different_random_numbers(made: Made, tmp_path: Path) -> None:
    children = made(begin="numpy")
    first, second = (ran(children, "draw", tmp_path) for _ in range(2))
    assert first[0] != second[0]
    assert first[1] != second[1]


def test_a_child_outlives_its_nursery_and_the_next_one_has_another(
    made: Made, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    children = made()
    children.require_ready()
    (nursery,) = begun(tmp_path)
    answers: list[Any] = []
    working = threading.Thread(target=lambda: answers.append(ran(children, "wait", tmp_path)))
    working.start()
    until((tmp_path / "pid-wait").exists)
    os.kill(nursery, signal.SIGKILL)
    until(lambda: not runs(nursery))
    (tmp_path / "go").touch()
    working.join(30)
    assert answers == ["wait"]
    assert ran(children, "fine", tmp_path) == "fine"
    assert len(begun(tmp_path)) == 2
    assert [record.message for record in caplog.records if "is gone" in record.message] == [
        "the process that others are forked from is gone, another begins"
    ]


def test_a_nursery_that_dies_while_it_begins_loses_the_work_and_says_how(made: Made, tmp_path: Path) -> None:
    children = made(begin="slow")

    def kill() -> None:
        until(lambda: begun(tmp_path))
        os.kill(begun(tmp_path)[0], signal.SIGSEGV)

    killing = threading.Thread(target=kill)
    killing.start()
    with pytest.raises(Unavailable, match="was ended by SIGSEGV") as caught:
        ran(children, "fine", tmp_path)
    killing.join()
    assert caught.value.metadata == {"signal": "SIGSEGV"}


def test_a_nursery_that_stands_still_is_ended_and_replaced(made: Made, tmp_path: Path) -> None:
    children = made()
    children.require_ready()
    (nursery,) = begun(tmp_path)
    os.kill(nursery, signal.SIGSTOP)
    assert ran(children, "fine", tmp_path) == "fine", "the child that waited works, the next one cannot start"
    with pytest.raises(Unavailable, match=r"was ended: it stood still for 1\.5 s") as caught:
        ran(children, "fine", tmp_path)
    assert caught.value.reason == "STALLED"
    assert not runs(nursery)
    assert ran(children, "fine", tmp_path) == "fine"


def test_work_that_is_wanted_no_more_before_it_began_leaves_nothing(made: Made, tmp_path: Path) -> None:
    before = ours()
    children = made(begin="slow")
    with pytest.raises(Cancelled):
        ran(children, "fine", tmp_path, Wanting(lambda: bool(begun(tmp_path))))
    children.close()
    assert ours() <= before


def test_what_a_child_left_is_gone_with_it(made: Made, tmp_path: Path) -> None:
    children = made()
    before = ours()
    with pytest.raises(Unavailable, match="ended with code 3"):
        ran(children, "leave", tmp_path)
    children.close()
    assert ours() <= before


def test_children_that_are_closed_while_one_is_forked_leave_nothing(made: Made, tmp_path: Path) -> None:
    before = ours()
    for number in range(8):
        children = made(prepare="slow")
        children.require_ready()
        assert ran(children, "fine", tmp_path) == "fine"
        time.sleep(0.003 * number)
        began = time.monotonic()
        children.close()
        assert time.monotonic() - began < 5.0
        assert ours() <= before


class Talking:
    """A nursery whose child says a lot and reads nothing: it is a thread of this process."""

    def __init__(self, leader: subprocess.Popen[bytes]) -> None:
        self.process = Process(leader.pid, leader.wait)
        self._over = threading.Event()

    def oom_kills(self) -> int:
        return 0

    def ask(self, line: socket.socket, stacks: int) -> None:
        del stacks
        self._talking = threading.Thread(target=self._talk, args=(Connection(os.dup(line.fileno())),))
        self._talking.start()

    def said(self) -> str:
        return "in talk"

    def end(self) -> None:
        self._over.set()
        self._talking.join()
        self.process.end()

    def _talk(self, line: Connection) -> None:
        deadline = time.monotonic() + 20.0
        with line:
            while not self._over.wait(0.01) and time.monotonic() < deadline:
                with suppress(BlockingIOError):
                    line.send(Idle())


def test_a_child_that_says_a_lot_and_reads_nothing_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nursery_module, "_MOVE_SECONDS", 1)
    with subprocess.Popen(["sleep", "60"], process_group=0) as leader:
        talking: Any = Talking(leader)
        child = Child(talking)
        tellings: list[float] = []

        def tell(send: Send) -> None:
            for _ in range(2):
                began = time.monotonic()
                send("x" * (8 << 20))
                tellings.append(time.monotonic() - began)

        def connected(send: Send) -> None:
            threading.Thread(target=tell, args=(send,), name="telling").start()

        watch = Watch(leader.pid, PATIENCE, Wanting())
        with pytest.raises(Unavailable, match="it takes no message for 1 s") as caught:
            child.run("order", {}, Wanting(), watch, connected)
        until(lambda: len(tellings) == 2)
        child.end()
    assert caught.value.reason == "STALLED"
    assert tellings[0] >= 1.0
    assert tellings[1] < 0.5, "what follows half a message would be read as the rest of it"


def test_who_calls_all_the_time_hears_that_the_work_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(_: Wanting) -> None:
        raise Cancelled("it is not wanted")

    monkeypatch.setattr(Wanting, "check", check)
    watch = Watch(os.getpid(), PATIENCE, Wanting())

    def call_for(seconds: float) -> None:
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            watch.served()

    with pytest.raises(Cancelled):
        call_for(10)
    assert watch.peak_bytes > 0


def test_no_work_begins_after_the_end(made: Made, tmp_path: Path) -> None:
    children = made()
    children.close()
    with pytest.raises(Unavailable) as caught:
        ran(children, "fine", tmp_path)
    assert caught.value.reason == "SHUTTING_DOWN"


DRIVER = """
import sys, time
from luthier.work.children import Children, Program

folder = sys.argv[1]
with Children(Program(command=("-P", f"{folder}/child.py"), setup={"folder": folder})) as children:
    children.require_ready()
    open(f"{folder}/idle", "x")
    time.sleep(600)
"""


def test_neither_nursery_nor_spare_outlive_a_driver_that_is_killed(made: Made, tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path)]) as driver:
        until((tmp_path / "idle").exists)
        (nursery,) = begun(tmp_path)
        children = everyone_of(tmp_path)
        assert nursery in children
        assert len(children) == 2
        driver.kill()
        killed_at = time.monotonic()
    until(lambda: not any(runs(one) for one in children), 1.0 - (time.monotonic() - killed_at))


def everyone_of(folder: Path) -> list[int]:
    """Processes that run the child of a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"{folder}/child.py".encode() in (path / "cmdline").read_bytes().split(b"\0"):
                found.append(int(path.name))
        except OSError:
            continue
    return found
