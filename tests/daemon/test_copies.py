"""Copies end as programs do: they wait for threads, do what was registered for the end, and say what they end with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.daemon import copies
from tests.daemon.copies import Copies

CALLER = """
import sys
sys.path[:0] = [{folder!r}, {here!r}]
import copies
copies.SECONDS = 2
copies._become("ending", [], {{}}, [{out!r}, {err!r}])
"""


def ended(folder: Path, code: str) -> tuple[int, str, str]:
    """(Status, output, errors) of a program that a copy becomes, which has two seconds."""
    (folder / "ending.py").write_text(code)
    out, err = folder / "out", folder / "err"
    caller = CALLER.format(
        folder=str(folder), here=str(Path(copies.__file__).parent), out=str(out), err=str(err)
    )
    done = subprocess.run([sys.executable, "-c", caller], check=False, timeout=60)
    return done.returncode, out.read_text(), err.read_text()


def test_a_thread_that_never_ends_is_a_program_that_does_not(tmp_path: Path) -> None:
    code = "import threading, time\nthreading.Thread(target=time.sleep, args=(600,)).start()\n"
    assert ended(tmp_path, code)[0] == -14


def test_what_is_said_while_it_ends_is_there(tmp_path: Path) -> None:
    code = (
        "import atexit, threading, time\n"
        "def late():\n    time.sleep(0.2)\n    print('thread')\n"
        "threading.Thread(target=late).start()\n"
        "atexit.register(lambda: print('registered'))\n"
        "print('main')\n"
    )
    assert ended(tmp_path, code) == (0, "main\nthread\nregistered\n", "")


@pytest.mark.parametrize(
    ("code", "status", "said"), [("None", 0, ""), ("3", 3, ""), ("'no home'", 1, "no home\n")]
)
def test_the_code_of_an_exit_is_the_interpreters(tmp_path: Path, code: str, status: int, said: str) -> None:
    assert ended(tmp_path, f"raise SystemExit({code})") == (status, "", said)


def test_a_process_that_ended_is_named_and_not_what_it_did_not_answer() -> None:
    command = [sys.executable, "-c", "raise SystemExit(5)"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, text=True, stdin=pipe, stdout=pipe) as process:
        process.wait()
        with pytest.raises(RuntimeError, match="the process that is copied ended, with status 5"):
            Copies(process).run("luthier.data", environment={})
