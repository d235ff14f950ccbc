"""Runs the tests in several processes, which are forked from the one that has imported and collected them all.

Each process of pytest-xdist would import and collect for itself, which takes longer than all tests of most folders.
"""

from __future__ import annotations

import os
import signal
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, Literal

import pytest

from luthier.work.forking import require_alone
from luthier.work.limited_child import end_with_parent

Group = list[int]
"""Tests, by their places in the session, that one process runs one after the other."""
Kind = Literal["next", "begun", "report", "warning"]
_END_SECONDS = 10.0


def group(items: Sequence[pytest.Item], name: Callable[[str], str]) -> deque[Group]:
    """Put together the tests whose ids have one name; groups are in the order of their first tests."""
    groups: dict[str, Group] = {}
    for place, item in enumerate(items):
        groups.setdefault(name(item.nodeid), []).append(place)
    return deque(groups.values())


def run(session: pytest.Session, num_processes: int, groups: deque[Group]) -> None:
    """Run all groups, each in the first process that is free.

    A process that ends by itself fails the test that it was at; another takes its place.

    Raises:
        pytest.Session.Failed, pytest.Session.Interrupted: as in one process.
        luthier.errors.Unavailable: what was imported has started a thread, or opened a device.
    """
    reporter = session.config.pluginmanager.getplugin("terminalreporter")
    if reporter is not None:
        reporter.showfspath = False  # results of several files come by turns
    config: Any = session.config
    config._tmp_path_factory.getbasetemp()  # made once, for all
    # Libraries that mind forks end their threads before the first one.
    os.waitpid(_forked(lambda: 0), 0)
    require_alone()
    with _Processes(session, groups).running(num_processes) as processes:
        while processes.hear():
            pass
    if session.shouldfail:
        raise session.Failed(session.shouldfail)
    if session.shouldstop:
        raise session.Interrupted(session.shouldstop)


@dataclass
class _Process:
    """One that runs tests.

    Attributes:
        place: its number, from 0.
        pid: its process id.
        line: to it.
        given: tests that it was given and has not begun.
        at: the test that it has begun; None: none yet.
    """

    place: int
    pid: int
    line: Connection
    given: deque[int] = field(default_factory=deque)
    at: int | None = None


class _Processes:
    """All that run, as the process sees it that reports what they say."""

    def __init__(self, session: pytest.Session, groups: deque[Group]) -> None:
        self._session = session
        self._groups = groups
        self._by_line: dict[Any, _Process] = {}

    @contextmanager
    def running(self, num_processes: int) -> Iterator[_Processes]:
        """Have so many run for the length of the block; none outlives it."""
        try:
            for place in range(num_processes):
                self._start(place)
            yield self
        finally:
            # One that has nobody to tell ends what its tests share; Ctrl-C has reached it by itself.
            for line in self._by_line:
                line.close()
            deadline = time.monotonic() + _END_SECONDS
            for process in self._by_line.values():
                _end(process.pid, deadline)

    def hear(self) -> bool:
        """Take in what is said next; returns whether any process goes on."""
        for line in wait(list(self._by_line)):
            process = self._by_line[line]
            try:
                kind, value = process.line.recv()
            except (EOFError, OSError):
                self._ended(process)
                continue
            self._take(process, kind, value)
        return bool(self._by_line)

    def _start(self, place: int) -> None:
        ours, theirs = Pipe()
        parent = os.getpid()

        def work() -> int:
            end_with_parent(parent)
            ours.close()
            _Work(self._session, theirs).run(place)
            return 0

        process = _Process(place=place, pid=_forked(work), line=ours)
        theirs.close()
        self._by_line[ours] = process

    def _take(self, process: _Process, kind: Kind, value: Any) -> None:
        hook = self._session.config.hook
        if kind == "next":
            stops = self._session.shouldfail or self._session.shouldstop
            wanted = [] if stops or not self._groups else self._groups.popleft()
            process.given.extend(wanted)
            with suppress(OSError):  # that it is gone shows when it is listened to
                process.line.send(wanted)
        elif kind == "begun":
            process.at = process.given.popleft()
            assert process.at == value
        elif kind == "report":
            report = hook.pytest_report_from_serializable(config=self._session.config, data=value)
            hook.pytest_runtest_logreport(report=report)
        else:
            hook.pytest_warning_recorded.call_historic(kwargs=value)

    def _ended(self, process: _Process) -> None:
        """Let go of one that is gone; where it was not done, say at which test, and let another go on after that."""
        del self._by_line[process.line]
        process.line.close()
        _, status = os.waitpid(process.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        if code == 0:
            return
        if process.at is None:
            raise pytest.UsageError(f"a process that was to run tests ended with {code} before its first")
        item = self._session.items[process.at]
        why = f"the process that ran this test ended with {code}"
        report = pytest.TestReport(item.nodeid, item.location, {}, "failed", why, "call")
        self._session.config.hook.pytest_runtest_logreport(report=report)
        if process.given:
            self._groups.appendleft(list(process.given))
        self._start(process.place)


class _Work:
    """What a process that runs tests does: it reports to a line what a session reports."""

    def __init__(self, session: pytest.Session, line: Connection) -> None:
        self._session = session
        self._line = line

    def run(self, place: int) -> None:
        """Run what is given until there is no more, or nobody to tell of it."""
        config = self._session.config
        plugins = config.pluginmanager
        for name in ("terminalreporter", "lfplugin", "nfplugin", "stepwiseplugin"):
            plugins.unregister(name=name)
        plugins.register(self, "forked")
        _capture_anew(plugins.getplugin("capturemanager"))
        _use_folder(config, place)
        try:
            self._run()
        finally:
            # What is shared, where it stopped in between.
            self._session._setupstate.teardown_exact(None)

    def _run(self) -> None:
        given = deque(self._next())
        while given and not self._session.shouldfail and not self._session.shouldstop:
            at = given.popleft()
            self._say("begun", at)
            if not given:
                given.extend(self._next())
            following = self._session.items[given[0]] if given else None
            item = self._session.items[at]
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Say how a phase of a test went."""
        config = self._session.config
        data = config.hook.pytest_report_to_serializable(config=config, report=report)
        self._say("report", data)

    def pytest_warning_recorded(
        self, warning_message: warnings.WarningMessage, when: str, nodeid: str, location: Any
    ) -> None:
        """Say what was warned of, less the object that it is about."""
        warning_message.source = None
        told = {"warning_message": warning_message, "when": when, "nodeid": nodeid, "location": location}
        self._say("warning", told)

    def _next(self) -> Group:
        self._say("next", None)
        found: Group = self._line.recv()
        return found

    def _say(self, kind: Kind, value: Any) -> None:
        self._line.send((kind, value))


def _forked(work: Callable[[], int]) -> int:
    """Return the id of a process that works and ends with the code that this returns."""
    errors = os.dup(2)  # the child may capture its own
    pid = os.fork()
    if pid:
        os.close(errors)
        return pid
    code = 1
    try:
        code = work()
    except (KeyboardInterrupt, EOFError, ConnectionError):
        pass  # nobody waits for more
    except BaseException:
        os.write(errors, traceback.format_exc().encode())
    finally:
        # What was registered for the end of the process that collected is not for this one.
        os._exit(code)


def _end(pid: int, deadline: float) -> None:
    """Wait until a process has ended, from the deadline on by force."""
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _capture_anew(manager: Any) -> None:
    """Capture into files of this process's own: those that were open when it was forked are everyone's."""
    manager.stop_global_capturing()
    manager.start_global_capturing()
    manager.suspend_global_capture()


def _use_folder(config: Any, place: int) -> None:
    """Have this process's temporary folders in one of its own."""
    factory = config._tmp_path_factory
    folder = factory.getbasetemp() / f"process-{place}"
    folder.mkdir(mode=0o700, exist_ok=True)
    factory._basetemp = folder
