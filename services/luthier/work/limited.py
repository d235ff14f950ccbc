"""A process that runs what nobody has read, under limits: started, asked, and ended when it takes too much."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from luthier.errors import Failure, LuthierError
from luthier.work.limited_child import Frames, FramesBroken, Limits

Check = Callable[[], None]
"""Returns while the work is still wanted and raises when it is not."""

ANSWER_BYTES = 64 << 20
"""Most that a process may answer at once."""
_POLL_SECONDS = 0.1
_START_SECONDS = 120.0
_STOP_SECONDS = 10.0


class LimitReached(Exception):
    """A request took more than a limit allows; the text says of what: `2 s of CPU time`. The process has ended."""


class ProcessBroken(Exception):
    """The process failed in a way that nobody foresaw; the text says how."""


class ProcessKilled(Exception):
    """The process was killed from outside."""


class Running(Protocol):
    """A process that was started here, as `subprocess.Popen` has it."""

    def poll(self) -> int | None:
        """Return its exit code; a signal's number, negative, where one ended it; None: it goes on."""
        ...

    def wait(self, timeout: float) -> int:
        """Return its exit code as soon as it has ended. Raises subprocess.TimeoutExpired."""
        ...

    def kill(self) -> None:
        """End it, whatever it does."""
        ...


class LimitedProcess:
    """One process that answers one request at a time. Not for several threads at once.

    It ends within a second of this process, however this one ends. `spawned` starts one. Before its first request it
    has two minutes to say that it is ready, whatever its limits are: a started one imports then.

    Args:
        process: what runs `limited_child.answer_requests`.
        connection: to it; closed with the process.
        limits: what a request may take.
    """

    def __init__(self, process: Running, connection: socket.socket, limits: Limits) -> None:
        self._limits = limits
        self._check: Check = lambda: None
        self._deadline = time.monotonic() + _START_SECONDS
        self._process = process
        connection.settimeout(_POLL_SECONDS)
        self._connection = connection
        self._frames = Frames(connection, ANSWER_BYTES, self._wait)
        self._ready = False

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        return self._process.poll() is None

    def call(
        self,
        request: Mapping[str, Any],
        *,
        check: Check = lambda: None,
        heard: Callable[[Mapping[str, Any]], None] = lambda _: None,
    ) -> dict[str, Any]:
        """Return the result of a request; `heard` is given each note that it sends before.

        `check` is called ten times a second; when it raises, or a limit is reached, the process is ended.

        Raises:
            LimitReached: it took too much time, memory or room for its answer.
            ProcessBroken: it failed in a way that nobody foresaw.
            ProcessKilled: somebody else ended it.
            LuthierError: what the request's handler raised.
        """
        self._check = check
        try:
            answer = self._exchange(request, heard)
        except FramesBroken as error:
            self.close()
            raise LimitReached(f"{ANSWER_BYTES >> 20} MiB for its answer") from error
        except LuthierError:  # some of them are OSErrors too
            self.close()
            raise
        except OSError as error:
            raise self._ended() from error
        except BaseException:
            self.close()
            raise
        return self._result(answer)

    def kill(self) -> None:
        """End the process, whatever it does; for any thread. A call under way raises ProcessKilled."""
        self._process.kill()

    def close(self) -> None:
        """End the process, whatever it does, and let go of it."""
        self._process.kill()
        self._process.wait(_STOP_SECONDS)
        self._connection.close()

    def _exchange(
        self, request: Mapping[str, Any], heard: Callable[[Mapping[str, Any]], None]
    ) -> dict[str, Any]:
        if not self._ready:
            self._next()
            self._ready = True
        self._restart_clock()
        self._frames.send(request)
        while "note" in (answer := self._next()):
            self._restart_clock()
            heard(answer["note"])
        return answer

    def _result(self, answer: Mapping[str, Any]) -> dict[str, Any]:
        if answer.get("ends"):
            self.close()
        if "failure" in answer:
            raise Failure(**answer["failure"]).to_error()
        if "limit" in answer:
            self.close()
            raise LimitReached(self._memory())
        if "result" not in answer:
            self.close()
            raise ProcessBroken(str(answer.get("broken")))
        result: dict[str, Any] = answer["result"]
        return result

    def _next(self) -> dict[str, Any]:
        answer = self._frames.receive()
        if answer is None:
            raise ConnectionResetError("the process ended")
        return answer

    def _restart_clock(self) -> None:
        self._deadline = time.monotonic() + self._limits.wall_seconds

    def _wait(self) -> None:
        self._check()
        if time.monotonic() > self._deadline:
            raise LimitReached(f"{self._limits.wall_seconds:g} s")

    def _memory(self) -> str:
        return f"{self._limits.memory_bytes >> 20} MiB of memory"

    def _ended(self) -> Exception:
        """Say why it ended without an answer."""
        self._connection.close()
        try:
            code = self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.close()
            return ProcessBroken("it closed its connection")
        if code == -signal.SIGXCPU:
            return LimitReached(f"{self._limits.cpu_seconds} s of CPU time")
        if code == -signal.SIGKILL:
            return ProcessKilled("it was killed from outside")
        if code in (-signal.SIGABRT, -signal.SIGSEGV):
            # How native code ends when it gets no memory.
            return LimitReached(self._memory())
        return ProcessBroken(f"it ended with code {code}")


def spawned(module: str, limits: Limits, folder: Path = Path("/")) -> LimitedProcess:
    """Start a process that runs a module, whose `main` calls `limited_child.serve`, in a working folder.

    It holds none of our environment, so that a template that got out of its sandbox would find no setting and no key.
    """
    # A process is told of its parent's death by the end of the thread that started it: that thread must stay.
    process, connection = spawner().submit(_spawn, module, limits, folder).result()
    return LimitedProcess(process, connection, limits)


@cache
def spawner() -> ThreadPoolExecutor:
    """Return the thread that starts processes which end with this one; it stays as long as this process."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="spawner")


def _spawn(module: str, limits: Limits, folder: Path) -> tuple[subprocess.Popen[bytes], socket.socket]:
    environment = {
        "PYTHONPATH": ":".join(str(Path(path).absolute()) for path in sys.path if path),
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        # Other pools reserve more address space than they use, which the limit would count.
        "ARROW_DEFAULT_MEMORY_POOL": "system",
    }
    ours, theirs = socket.socketpair()
    words = [str(theirs.fileno()), str(os.getpid()), json.dumps(dataclasses.asdict(limits))]
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            cwd=folder,
            env=environment,
            pass_fds=[theirs.fileno()],
        )
    return process, ours
