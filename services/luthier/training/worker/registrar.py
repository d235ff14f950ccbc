"""Registrations in processes of their own: beside a training, ended when they hang, their memory gone with them.

transformers changes torch's default type while it loads a model, for the whole process: a training in another thread
would make tensors of the wrong type. And a thread that opens a pipe that nobody writes to can never be ended.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import queue
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from luthier.errors import Internal, LuthierError, Reason, Unavailable
from luthier.lm.register import RegisteredFiles, Source, register_source

STALL_SECONDS = 120.0
"""A registration that neither computes, reads nor writes for this long hangs; the Hub's own limit is 10 s."""
_POLL_SECONDS = 0.2
_FORK = multiprocessing.get_context("fork")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Order:
    source: Source
    directory: Path
    scratch: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class _Died:
    code: int


_Answer = RegisteredFiles | Exception | _Died


class _TemplateGone(Exception):
    """The process that forks is not there any more."""


class Registrar:
    """Runs `register_source` in child processes, `slots` at a time; close it at the end.

    They are forked from processes that were forked from this one when it was made, which have imported all
    that a registration needs and done nothing since. So make it before anything starts a thread or opens a
    device.
    """

    def __init__(self, slots: int, stall_seconds: float = STALL_SECONDS) -> None:
        self._stall_seconds = stall_seconds
        self._templates: list[_Template] = []
        for _ in range(slots):
            self._templates.append(_Template(self._templates))
        self._free: queue.SimpleQueue[_Template] = queue.SimpleQueue()
        for template in self._templates:
            self._free.put(template)

    def register(
        self, source: Source, directory: Path, scratch: Path, check: Callable[[], None]
    ) -> RegisteredFiles:
        """Do as `register_source` does, in a process of its own; `check` is called often and may raise to end it.

        Raises:
            LuthierError: what `register_source` raises.
            Unavailable: STALLED, it hung and was ended; WORKER_LOST, it was killed from outside.
            MemoryError: there was not enough of it.
        """
        template = self._free.get()
        try:
            answer = template.run(
                _Order(source=source, directory=directory, scratch=scratch), check, self._stall_seconds
            )
        except _TemplateGone as error:
            # Threads run by now, so no new template can be forked: a new worker process may have one.
            _logger.exception("the template of registrations is gone, the worker stops")
            os.kill(os.getpid(), signal.SIGTERM)
            raise Unavailable("no process can register models here", reason=Reason.WORKER_LOST) from error
        finally:
            self._free.put(template)
        if isinstance(answer, RegisteredFiles):
            return answer
        if isinstance(answer, _Died):
            raise Unavailable(
                f"the process that registers the model ended with code {answer.code}",
                reason=Reason.WORKER_LOST,
            )
        raise answer

    def close(self) -> None:
        """End all processes."""
        for template in self._templates:
            template.close()


class _Template:
    """The worker's end of a process that waits for orders and forks a child for each."""

    def __init__(self, earlier: Sequence[_Template]) -> None:
        self._connection, theirs = _FORK.Pipe()
        # A copy of the worker's end that stayed open would keep the other processes from seeing the worker end.
        ends = [self._connection, *(template._connection for template in earlier)]
        self._process = _FORK.Process(target=_serve, args=(theirs, ends))
        self._process.start()
        theirs.close()

    def run(self, order: _Order, check: Callable[[], None], stall_seconds: float) -> _Answer:
        self._say(order)
        pid: int = self._hear()
        signs, active_at = _signs_of_life(pid), time.monotonic()
        try:
            while not self._connection.poll(_POLL_SECONDS):
                check()
                now, seen = time.monotonic(), _signs_of_life(pid)
                if seen != signs:
                    signs, active_at = seen, now
                if now - active_at > stall_seconds:
                    raise Unavailable(
                        f"the registration stood still for {stall_seconds:g} s and was ended; the source must hold "
                        "regular files that can be read",
                        reason=Reason.STALLED,
                    )
        except BaseException:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            self._hear()  # how it ended, which must not be taken for the next one's answer
            raise
        answer: _Answer = self._hear()
        return answer

    def _say(self, order: _Order) -> None:
        try:
            self._connection.send(order)
        except OSError as error:
            raise _TemplateGone from error

    def _hear(self) -> Any:
        try:
            return self._connection.recv()
        except (EOFError, OSError) as error:
            raise _TemplateGone from error

    def close(self) -> None:
        self._connection.close()
        self._process.join()


def _serve(connection: Connection, worker_ends: Sequence[Connection]) -> None:
    """Take orders until the worker is gone, whichever way it went."""
    for end in worker_ends:
        end.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the worker too, which closes its end
    with suppress(EOFError, OSError):
        while True:
            connection.send(_answer_of_child(connection.recv(), connection))


def _answer_of_child(order: _Order, connection: Connection) -> _Answer:
    answers, theirs = _FORK.Pipe(duplex=False)
    child = _FORK.Process(target=_register, args=(order, theirs, connection))
    child.start()
    theirs.close()
    connection.send(child.pid)
    try:
        if connection in wait([answers, connection]):
            raise EOFError("the worker is gone: it never speaks before it has an answer")
        answer: _Answer = answers.recv()
    except EOFError:
        if connection.poll():
            child.kill()
            raise
        child.join()
        return _Died(code=child.exitcode or 0)
    finally:
        answers.close()
    child.join()
    return answer


def _register(order: _Order, answers: Connection, connection: Connection) -> None:
    connection.close()
    answer: _Answer
    try:
        answer = register_source(order.source, order.directory, scratch=order.scratch)
    except (LuthierError, MemoryError) as error:
        answer = error
    except Exception as error:
        _logger.exception("registration failed unexpectedly")
        answer = Internal(f"{type(error).__name__}: {error}")
    answers.send(answer)


def _signs_of_life(pid: int) -> tuple[str, ...]:
    """Return what changes while a process computes, reads or writes; empty when it is gone."""
    try:
        times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        moved = Path(f"/proc/{pid}/io").read_text().splitlines()[:2]
    except OSError:
        return ()
    return (*times, *moved)
