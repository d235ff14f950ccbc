"""Our programs, run in copies of one process that has imported what they import: that is four fifths of a short run.

What a copy runs is what `python -m` runs, with the arguments, the environment, the output and the status of a process
of its own. It has the seed of hashes of the process that it was copied from, and ends without taking itself apart: that
would copy all the memory that the two share.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

PROGRAMS = ("luthier.data", "luthier.training", "luthier.evaluation", "luthier.daemon")
IMPORTED = ("luthier.daemon.fsck",)
"""What a program imports later than at its start."""
UNTHREADED = {"JE_ARROW_MALLOC_CONF": "background_thread:false", "OPENBLAS_NUM_THREADS": "1"}
"""Has libraries start no threads when they are imported: a copy would lack them."""
SECONDS = 120


class Copies:
    """A process that is copied for each run, one at a time."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(
        self, program: str, *arguments: str, environment: Mapping[str, str]
    ) -> subprocess.CompletedProcess[str]:
        """Return how `python -m program` ended, within two minutes."""
        assert program in PROGRAMS, program
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            outputs = [str(Path(folder) / name) for name in ("out", "err")]
            order = {
                "program": program,
                "arguments": arguments,
                "environment": dict(environment),
                "outputs": outputs,
            }
            try:
                self._process.stdin.write(json.dumps(order) + "\n")
                self._process.stdin.flush()
            except BrokenPipeError:  # nothing is answered then
                with suppress(BrokenPipeError):
                    self._process.stdin.close()
            answer = self._process.stdout.readline()
            if not answer:
                raise RuntimeError(f"the process that is copied ended, with status {self._process.wait()}")
            status = int(answer)
            out, err = (Path(path).read_text() for path in outputs)
        return subprocess.CompletedProcess([program, *arguments], status, out, err)


@contextmanager
def copies() -> Iterator[Copies]:
    """Start the process that is copied, for the length of a block."""
    command = [sys.executable, "-P", str(Path(__file__))]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ | UNTHREADED, **pipes) as process:
        try:
            yield Copies(process)
        finally:
            process.kill()


def _serve() -> None:
    for program in PROGRAMS:
        importlib.import_module(f"{program}.__main__")
        # It is run as a program's main module, which nobody has imported.
        del sys.modules[f"{program}.__main__"]
    for module in IMPORTED:
        importlib.import_module(module)
    gc.freeze()
    for line in sys.stdin:
        order = json.loads(line)
        assert len(os.listdir("/proc/self/task")) == 1, "a copy would lack the other threads"
        if (pid := os.fork()) == 0:
            _become(**order)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _become(
    program: str, arguments: Sequence[str], environment: Mapping[str, Any], outputs: Sequence[str]
) -> NoReturn:
    """Be a program until it ends."""
    for number, path in enumerate(("/dev/null", *outputs)):
        mode = os.O_WRONLY | os.O_CREAT if number else os.O_RDONLY
        os.dup2(os.open(path, mode, 0o600), number)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [program, *arguments]
    signal.alarm(SECONDS)
    status = 1
    try:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as ended:
        status = _status_of(ended.code)
    except BaseException:
        traceback.print_exc()
    try:
        _end()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _status_of(code: object) -> int:
    """The status that the interpreter would end with, having written a code that is none."""
    if code is None or isinstance(code, int):
        return code or 0
    print(code, file=sys.stderr)
    return 1


def _end() -> None:
    """Wait for threads and run what was registered for the end, as the interpreter does before it is taken apart.

    A thread that never ends is the alarm's: the program then ends by a signal, as one that hangs does.
    """
    threads: Any = threading
    threads._shutdown()
    registered: Any = atexit
    registered._run_exitfuncs()


if __name__ == "__main__":
    _serve()
