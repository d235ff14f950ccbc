"""Work in processes of their own: they crash, hang and are killed alone, and end with their driver."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from luthier.errors import Cancelled, Internal, InvalidArgument, LuthierError, ResourceExhausted, Unavailable
from luthier.work.child_ends import End
from luthier.work.child_watch import Patience
from luthier.work.children import Children, Program
from luthier.work.control_groups import oom_kills

# Does what its order says, with nothing imported that takes long.
CHILD = """
import ctypes, os, signal, subprocess, sys, time
from pathlib import Path
from luthier.errors import InvalidArgument
from luthier.work.child import serve

def prepare(setup):
    if setup.get("refuses"):
        raise InvalidArgument("no such device")
    (Path(setup["folder"]) / f"prepared-{os.getpid()}").touch()
    return work

def work(line, order):
    what, folder = order
    if folder:
        (Path(folder) / "pid").write_text(str(os.getpid()))
    if what == "ask":
        line.tell("told", (1,), {"more": 2})
        return line.ask("asked", (20, 22)), os.getpid(), os.environ.get("LUTHIER_HOME"), os.environ["OF_IT"]
    if what == "score":
        return int(Path("/proc/self/oom_score_adj").read_text())
    if what == "crash":
        ctypes.string_at(0)
    if what == "leave":
        os._exit(3)
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "full":
        raise MemoryError("12 GB")
    if what == "odd":
        raise KeyError("surprise")
    if what == "bad":
        raise InvalidArgument("no model", reason="MODEL_INVALID")
    if what == "hang":
        os.mkfifo(Path(folder) / "fifo")
        open(Path(folder) / "fifo").read()
    if what in ("killed when asked", "ended by asking"):
        def killed(*_):
            (Path(folder) / "asked").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        signal.signal(signal.SIGUSR1, killed if what == "killed when asked" else signal.SIG_DFL)
        time.sleep(600)
    if what == "deaf":
        # Holds the interpreter, so that nothing in this process hears anything.
        subprocess.Popen(["sleep", "600"])
        (Path(folder) / "begun").touch()
        ctypes.PyDLL(None).sleep(600)
    if what == "spin":
        line.tell("step")
        line.tell("step")
        while True:
            pass
    if what == "busy":
        end = time.monotonic() + 3
        while time.monotonic() < end:
            sum(range(1000))
    if what == "steps":
        end = time.monotonic() + 4
        while time.monotonic() < end:
            line.alive()
            time.sleep(0.01)
    return what

serve(prepare)
"""
PATIENCE = Patience(still_seconds=1.5, first_seconds=60.0, silent_seconds=2.0, median_steps=2.0)


class Wanting:
    """Wants the work until `enough` says otherwise; hears what is reported."""

    def __init__(self, enough: Callable[[], bool] = lambda: False) -> None:
        self.lines: list[str] = []
        self._enough = enough

    def check(self) -> None:
        self.heed()

    def heed(self) -> None:
        if self._enough():
            raise Cancelled("asked to stop")

    def log(self, text: str, severity: str = "INFO") -> None:
        self.lines.append(f"{severity} {text}")


Run = Callable[..., Any]


@pytest.fixture
def program(tmp_path: Path) -> Program:
    (tmp_path / "child.py").write_text(CHILD)
    return Program(
        command=("-P", str(tmp_path / "child.py")),
        setup={"folder": str(tmp_path)},
        environment={"OF_IT": "yes"},
    )


@pytest.fixture
def children(program: Program) -> Iterator[Children]:
    with Children(program, PATIENCE, lambda: 0) as found:
        yield found


@pytest.fixture
def run(children: Children, tmp_path: Path) -> Run:
    def ran(what: str, overseer: Any = None, **calls: Callable[..., Any]) -> Any:
        calls = {"step": lambda: None, **calls}
        return children.run((what, str(tmp_path)), calls, overseer or Wanting(), "step")

    return ran


def pid_of(folder: Path) -> int:
    return int((folder / "pid").read_text())


def runs(pid: int) -> bool:
    """Whether a thread of a process is left: the first one may be gone before the others."""
    states = []
    for path in Path(f"/proc/{pid}/task").glob("*/stat"):
        with suppress(OSError):
            states.append(path.read_text().rpartition(")")[2].split()[0])
    return any(state not in "ZX" for state in states)


def prepared(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("prepared-")) for path in folder.glob("prepared-*")]


def until(done: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_child_tells_and_asks_its_driver_and_knows_none_of_its_settings(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LUTHIER_HOME", "/secret")
    told: list[Any] = []
    answer = run("ask", told=lambda *one, **more: told.append((one, more)), asked=lambda a, b: a + b)
    assert told == [((1,), {"more": 2})]
    assert answer[0] == 42
    assert answer[1] != os.getpid()
    assert answer[2:] == (None, "yes")


def test_what_a_child_asks_for_in_vain_ends_its_work(run: Run, tmp_path: Path) -> None:
    def refuse(*_: Any) -> None:
        raise Unavailable("no room", reason="DISK_FULL")

    with pytest.raises(Unavailable, match="no room"):
        run("ask", told=lambda *_, **__: None, asked=refuse)
    assert not runs(pid_of(tmp_path))


@pytest.mark.parametrize(
    ("what", "kind", "reason", "said"),
    [
        ("crash", Unavailable, "CRASHED", "was ended by SIGSEGV"),
        ("leave", Unavailable, "CRASHED", "ended with code 3"),
        (
            "killed",
            Unavailable,
            "CRASHED",
            "was ended by SIGKILL, from outside: the kernel counts no process",
        ),
        ("bad", InvalidArgument, "MODEL_INVALID", "no model"),
        ("odd", Internal, "INTERNAL", "KeyError: 'surprise'"),
    ],
)
def test_how_a_child_ends_is_told_and_the_next_one_works(
    run: Run, what: str, kind: type[LuthierError], reason: str, said: str
) -> None:
    with pytest.raises(kind, match=said) as caught:
        run(what)
    assert caught.value.reason == reason
    assert run("fine") == "fine"


def test_a_child_that_has_no_memory_says_so(run: Run) -> None:
    with pytest.raises(MemoryError, match="12 GB"):
        run("full")


def test_a_crash_says_where_it_was(run: Run) -> None:
    wanting = Wanting()
    with pytest.raises(Unavailable) as caught:
        run("crash", wanting)
    assert caught.value.metadata == {"signal": "SIGSEGV"}
    (line,) = wanting.lines
    assert line.startswith(
        "WARNING the process that did the work crashed:\nFatal Python error: Segmentation fault"
    )
    assert "string_at" in line


def test_a_kill_while_the_kernel_counts_one_for_want_of_memory_is_out_of_memory(
    program: Program, tmp_path: Path
) -> None:
    counted = iter(range(9))
    with (
        Children(program, PATIENCE, lambda: next(counted)) as children,
        pytest.raises(ResourceExhausted, match="ended by the kernel for want of memory") as caught,
    ):
        children.run(("killed", ""), {}, Wanting())
    assert caught.value.reason == "OUT_OF_MEMORY"


def test_another_end_while_the_kernel_counts_one_is_none_for_want_of_memory() -> None:
    ended = End(code=-signal.SIGSEGV, oom_kills=1, peak_bytes=3 << 20).error()
    assert (ended.reason, ended.code) == ("CRASHED", "UNAVAILABLE")
    assert "it held up to 3 MiB of the machine's" in ended.message


def test_the_kernel_is_asked_to_end_a_child_before_its_driver(run: Run) -> None:
    own = int(Path("/proc/self/oom_score_adj").read_text())
    assert run("score") == max(own, 500)


def test_this_kernel_counts_what_it_ends_for_want_of_memory() -> None:
    assert "oom_kill " in Path("/proc/vmstat").read_text()
    assert oom_kills() >= 0


def test_a_child_that_stands_still_is_ended_and_says_where(run: Run, tmp_path: Path) -> None:
    wanting = Wanting()
    with pytest.raises(
        Unavailable, match=r"did not go on and was ended: it stood still for 1\.5 s"
    ) as caught:
        run("hang", wanting)
    assert caught.value.reason == "STALLED"
    assert not runs(pid_of(tmp_path))
    (line,) = wanting.lines
    assert line.startswith("WARNING the process that does the work hangs:\n")
    assert "in work" in line


def test_work_may_have_a_patience_of_its_own(children: Children, tmp_path: Path) -> None:
    patience = replace(PATIENCE, still_seconds=0.5)
    with pytest.raises(Unavailable, match=r"it stood still for 0\.5 s"):
        children.run(("hang", str(tmp_path)), {"step": lambda: None}, Wanting(), "step", patience)


def test_a_child_that_computes_and_comes_to_no_end_of_a_step_is_ended_and_says_where(
    run: Run, tmp_path: Path
) -> None:
    wanting = Wanting()
    with pytest.raises(Unavailable, match="came to no end of a step") as caught:
        run("spin", wanting)
    assert caught.value.reason == "STALLED"
    assert not runs(pid_of(tmp_path))
    assert "in work" in wanting.lines[0]


def test_a_child_that_goes_on_is_left_alone(run: Run) -> None:
    assert run("steps") == "steps", "it takes longer than it may be silent or stand still"


def test_a_child_that_makes_no_steps_may_compute_for_as_long_as_it_likes(children: Children) -> None:
    assert children.run(("busy", ""), {}, Wanting()) == "busy"


def test_a_child_that_does_not_listen_ends_with_all_that_it_started(run: Run, tmp_path: Path) -> None:
    """It holds the interpreter, hears nothing, and has a child of its own."""
    began: list[float] = []

    def enough() -> bool:
        if (tmp_path / "begun").exists():
            began.append(time.monotonic())
        return bool(began)

    with pytest.raises(Cancelled):
        run("deaf", Wanting(enough))
    assert time.monotonic() - began[0] < 10.0
    pid = pid_of(tmp_path)
    assert not runs(pid)
    assert not [one for one in group(pid) if runs(one)]


def group(pid: int) -> list[int]:
    """Processes of a group."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(words[2]) == pid:
            found.append(int(path.parent.name))
    return found


DRIVER = """
import sys
from luthier.work.children import Children, Program

class Wanting:
    def check(self): pass
    def heed(self): pass
    def log(self, text, severity="INFO"): pass

folder = sys.argv[1]
with Children(Program(command=("-P", f"{folder}/child.py"), setup={"folder": folder})) as children:
    children.run(("deaf", folder), {}, Wanting())
"""


def test_no_child_outlives_a_driver_that_is_killed(program: Program, tmp_path: Path) -> None:
    """One that holds the interpreter, and so cannot see that its line is closed."""
    environ = {**os.environ, "OF_IT": "yes"}
    with subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path)], env=environ) as driver:
        until((tmp_path / "begun").exists)
        child = pid_of(tmp_path)
        driver.kill()
        killed_at = time.monotonic()
    until(lambda: not runs(child), 1.0 - (time.monotonic() - killed_at))


def test_one_child_waits_for_work_and_takes_it(children: Children, run: Run, tmp_path: Path) -> None:
    children.require_ready()
    (spare,) = prepared(tmp_path)
    children.warm()
    children.require_ready()
    assert prepared(tmp_path) == [spare], "one at a time"
    assert run("fine") == "fine"
    assert pid_of(tmp_path) == spare
    assert not runs(spare), "its memory is gone with it"
    until(lambda: len(prepared(tmp_path)) == 2)
    (other,) = set(prepared(tmp_path)) - {spare}
    children.close()
    assert not runs(other)


def test_a_spare_that_was_killed_is_replaced(children: Children, run: Run, tmp_path: Path) -> None:
    children.require_ready()
    (spare,) = prepared(tmp_path)
    os.kill(spare, signal.SIGKILL)
    until(lambda: not runs(spare))
    assert run("fine") == "fine"


def test_a_driver_whose_children_cannot_prepare_says_why(program: Program) -> None:
    refusing = Program(command=program.command, setup={"refuses": True})
    with Children(refusing, PATIENCE) as children:
        with pytest.raises(InvalidArgument, match="no such device"):
            children.require_ready()
        with pytest.raises(Unavailable, match="could not begin: no such device") as caught:
            children.run(("fine", ""), {}, Wanting())
    assert caught.value.reason == "CRASHED", "the work is not at fault, and may go well elsewhere"
