"""Tests in several processes: each runs once, groups stay together, and a process that dies fails its test."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from tests.processes import group

ROOT = Path(__file__).parent.parent
CONFTEST = """
import json, os
import pytest
from tests import processes

def name(test):
    return test.partition("[")[0]

@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    processes.run(session, 2, processes.group(session.items, name))
    return True

def tell(what):
    with open("told", "a") as file:
        file.write(json.dumps({"pid": os.getpid(), "what": what}) + "\\n")

def pytest_runtest_logreport(report):
    if os.environ["PARENT"] == str(os.getpid()):
        tell(["reported", report.nodeid, report.when, report.outcome])

def pytest_configure(config):
    os.environ["PARENT"] = str(os.getpid())

@pytest.fixture(scope="session", autouse=True)
def whole():
    tell(["set up"])
    yield
    tell(["torn down"])

@pytest.fixture
def told(request):
    tell(["ran", request.node.nodeid])
"""
TESTS = """
import os, signal, sys, warnings
import pytest

pytestmark = pytest.mark.usefixtures("told")

@pytest.mark.parametrize("number", range(20))
def test_many(number, tmp_path):
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").write_text("")

def test_fails():
    print("said before it failed")
    warnings.warn("mind this")
    assert os.getpid() == 0, "as it must"

def test_is_skipped():
    pytest.skip("for a reason")

@pytest.mark.parametrize("number", range(3))
def test_dies(number):
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)

def test_comes_after_all():
    pass
"""


WAITING = """
import time
import pytest

@pytest.mark.parametrize("number", range(2))
def test_waits(told, number):
    time.sleep(600)

def test_waits_too(told):
    time.sleep(600)
"""
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", "."]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, Any]]]:
    """What pytest printed, and what the tests told."""
    folder = tmp_path_factory.mktemp("some")
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_some.py").write_text(TESTS)
    done = subprocess.run(
        [*PYTEST, f"--basetemp={folder / 'temporary'}", "."],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout, [json.loads(line) for line in (folder / "told").read_text().splitlines()]


def of(told: list[dict[str, Any]], kind: str) -> list[tuple[int, list[str]]]:
    return [(one["pid"], one["what"][1:]) for one in told if one["what"][0] == kind]


def test_run_runs_each_test_once_and_reports_each(ran: tuple[str, list[dict[str, Any]]]) -> None:
    printed, told = ran
    names = [what[0] for _, what in of(told, "ran")]
    assert len(names) == len(set(names)) == 26
    calls = {name: outcome for _, (name, when, outcome) in of(told, "reported") if when == "call"}
    assert len(calls) == 26
    assert [name for name, outcome in sorted(calls.items()) if outcome == "failed"] == [
        "test_some.py::test_dies[1]",
        "test_some.py::test_fails",
    ]
    assert "2 failed, 23 passed, 1 skipped" in printed
    for words in ("as it must", "said before it failed", "UserWarning: mind this", "ended with -9"):
        assert words in printed


def test_run_keeps_a_group_in_one_process_unless_that_dies(ran: tuple[str, list[dict[str, Any]]]) -> None:
    _, told = ran
    processes = defaultdict(set)
    for pid, (name,) in of(told, "ran"):
        processes[name.partition("[")[0]].add(pid)
    assert len(processes["test_some.py::test_many"]) == 1
    assert len(processes["test_some.py::test_dies"]) == 2
    assert len(set().union(*processes.values())) in (2, 3)


def test_run_sets_up_and_tears_down_what_a_session_shares_in_each_process(
    ran: tuple[str, list[dict[str, Any]]],
) -> None:
    _, told = ran
    began, ended = ({pid for pid, _ in of(told, kind)} for kind in ("set up", "torn down"))
    died = {pid for pid, (name,) in of(told, "ran") if name == "test_some.py::test_dies[1]"}
    assert began - ended == died


def test_run_ends_with_what_is_shared_torn_down_where_it_is_interrupted(tmp_path: Path) -> None:
    """Two processes are in tests that do not end; Ctrl-C reaches all three."""
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_some.py").write_text(WAITING)
    with subprocess.Popen(
        [*PYTEST, f"--basetemp={tmp_path / 'temporary'}", "."],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,
    ) as running:
        told = tmp_path / "told"
        deadline = time.monotonic() + 60
        while not (told.exists() and told.read_text().count('["ran"') == 2) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(running.pid, signal.SIGINT)
        printed, _ = running.communicate(timeout=60)
    assert running.returncode == pytest.ExitCode.INTERRUPTED, printed
    found = [json.loads(line) for line in told.read_text().splitlines()]
    began, ended = ({pid for pid, _ in of(found, kind)} for kind in ("set up", "torn down"))
    assert began == ended
    assert len(ended) == 2


def test_group_puts_together_what_has_one_name_in_the_order_of_the_first() -> None:
    class Item:
        def __init__(self, nodeid: str) -> None:
            self.nodeid = nodeid

    items: Any = [Item(one) for one in ("a[1]", "b", "a[2]", "c", "b")]
    assert list(group(items, lambda test: test[0])) == [[0, 2], [1, 4], [3]]
