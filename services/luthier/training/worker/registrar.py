"""Registrations in processes of their own: beside a training, ended when they hang, their memory gone with them.

transformers changes torch's default type while it loads a model, for the whole process: a training in another thread
would make tensors of the wrong type. And a thread that opens a pipe that nobody writes to can never be ended.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.errors import Reason, Unavailable

if TYPE_CHECKING:
    from luthier.lm.sources import RegisteredFiles, Source

STALL_SECONDS = 120.0
"""A registration that neither computes, reads nor writes for this long hangs; the Hub's own limit is 10 s."""
_POLL_SECONDS = 0.2
_CHILD = ("-P", "-m", "luthier.training.worker.register_child")


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What a child is told: the source, where to write, where to download to, and torch's threads (0: as it likes)."""

    source: Source
    directory: Path
    scratch: Path
    num_threads: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What a child answers when all went well."""

    files: RegisteredFiles


Answer = Made | Exception


class Registrar:
    """Runs `register_source` in a child process for each registration.

    Attributes:
        stall_seconds: a child that shows no sign of life for this long is ended.
        num_threads: torch's threads in the child; 0: as torch likes.
    """

    def __init__(
        self, num_threads: int = 0, stall_seconds: float = STALL_SECONDS, child: Sequence[str] = _CHILD
    ) -> None:
        self.num_threads = num_threads
        self.stall_seconds = stall_seconds
        self._child = child

    def register(
        self, source: Source, directory: Path, scratch: Path, check: Callable[[], None]
    ) -> RegisteredFiles:
        """Do as `register_source` does, in a process of its own; `check` is called often and may raise to end it.

        Raises:
            LuthierError: what `register_source` raises.
            Unavailable: STALLED, it hung and was ended; WORKER_LOST, its process ended without an answer.
            MemoryError: there was not enough of it.
        """
        order = Order(source=source, directory=directory, scratch=scratch, num_threads=self.num_threads)
        ours, theirs = socket.socketpair()
        with theirs, Connection(ours.detach()) as connection:
            command = [sys.executable, *self._child, str(theirs.fileno())]
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
            theirs.close()
            try:
                return self._answer(connection, process, order, check)
            finally:
                process.kill()
                process.wait()

    def _answer(
        self,
        connection: Connection,
        process: subprocess.Popen[bytes],
        order: Order,
        check: Callable[[], None],
    ) -> RegisteredFiles:
        try:
            connection.send(order)
            self._wait(connection, process.pid, check)
            answer: Answer = connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            code = process.wait()
            raise Unavailable(
                f"the process that registers the model ended with code {code}", reason=Reason.WORKER_LOST
            ) from error
        if isinstance(answer, Made):
            return answer.files
        raise answer

    def _wait(self, connection: Connection, pid: int, check: Callable[[], None]) -> None:
        """Return when there is something to read, an answer or the end."""
        signs, active_at = _signs_of_life(pid), time.monotonic()
        while not connection.poll(_POLL_SECONDS):
            check()
            now, seen = time.monotonic(), _signs_of_life(pid)
            if seen != signs:
                signs, active_at = seen, now
            if now - active_at > self.stall_seconds:
                raise Unavailable(
                    f"the registration stood still for {self.stall_seconds:g} s and was ended; the source must "
                    "hold regular files that can be read",
                    reason=Reason.STALLED,
                )


def end_with_worker(connection: Connection) -> None:
    """End this process when the worker is gone or wants no answer any more: it says nothing after its order."""
    try:
        connection.recv()
    except (EOFError, OSError):
        os.kill(os.getpid(), signal.SIGKILL)


def _signs_of_life(pid: int) -> tuple[str, ...]:
    """Return what changes while a process computes, reads or writes; empty when it is gone."""
    try:
        times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        moved = Path(f"/proc/{pid}/io").read_text().splitlines()[:2]
    except OSError:
        return ()
    return (*times, *moved)
