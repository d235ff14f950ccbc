"""Blocking calls to other services: repeated until they answer for good, and given up when nobody wants them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from queue import Empty, SimpleQueue
from typing import Protocol, TypeVar

import grpc

from luthier.errors import Unavailable
from luthier.work.limited import Check
from luthier.work.peers import Backoff, is_final, peer_error_of

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
Token = Callable[[], str]
"""Gives a fresh credential: one of a task lives for minutes, what it is for may take hours."""
PATIENCE_SECONDS = 120.0
HEAR_SECONDS = 0.2
"""How often a wait looks whether it is still wanted."""
_AHEAD = 4
_PEER = "the other service"


class Answer(Protocol[T_co]):
    """A unary call that is under way, as a stub's `future` begins it."""

    def result(self, timeout: float | None = None) -> T_co:
        """Return the answer; grpc.FutureTimeoutError when it did not come in time."""
        ...

    def cancel(self) -> object:
        """Give the call up."""
        ...


class Messages(Protocol[T_co]):
    """A call that streams messages, as a stub begins it."""

    def __iter__(self) -> Iterator[T_co]:
        """Wait for one message after the other."""
        ...

    def cancel(self) -> object:
        """Give the call up."""
        ...


def retrying(
    call: Callable[[], T], check: Check = lambda: None, patience_seconds: float = PATIENCE_SECONDS
) -> T:
    """Return what `call` returns, repeating it for at most `patience_seconds` unless the answer is final.

    Between two tries `check` is called every `HEAR_SECONDS`; what it raises ends the wait.

    Raises:
        Unavailable: it did not answer in time; the reason is that of its last answer.
        LuthierError: its final answer, as the error tree.
    """
    deadline = time.monotonic() + patience_seconds
    backoff = Backoff(0.2, 5.0)
    while True:
        try:
            return call()
        except grpc.RpcError as refused:
            error = peer_error_of(refused, _PEER)
            delay_seconds = backoff.after(error)
            if is_final(refused):
                raise error from refused
            if time.monotonic() + delay_seconds > deadline:
                # Whatever it was, it may pass: a task that met it is tried again, not failed.
                raise Unavailable(error.message, reason=error.reason, metadata=error.metadata) from refused
        _sleep(delay_seconds, check)


def asked(begin: Callable[[], Answer[T]], check: Check = lambda: None) -> T:
    """Return the answer to a unary call, repeated as `retrying` does; `check` is called while it waits, too.

    Raises:
        LuthierError: as `retrying`, or what `check` raised.
    """
    return retrying(lambda: answered(begin(), check), check)


def streamed(begin: Callable[[], Messages[T]], check: Check = lambda: None) -> Iterator[T]:
    """Yield the messages of a call that streams, beginning it again after a break.

    `begin` asks for what follows the messages that were taken so far; `check` is called before each of them, and
    every `HEAR_SECONDS` while there is none. Memory: a few messages ahead.

    Raises:
        LuthierError: as `retrying`, or what `check` raised.
    """
    while True:
        try:
            with _Stream.opened(begin, check) as stream:
                yield from stream
        except grpc.RpcError as error:
            if is_final(error):
                raise peer_error_of(error, _PEER) from error
        else:
            return


def answered(call: Answer[T], check: Check) -> T:
    """Return the answer to a call that is under way, calling `check` while it waits.

    Raises:
        grpc.RpcError: it failed.
        Exception: what `check` raised; the call is given up then.
    """
    try:
        while True:
            try:
                return call.result(timeout=HEAR_SECONDS)
            except grpc.FutureTimeoutError:
                check()
    except BaseException:
        call.cancel()
        raise


def _sleep(seconds: float, check: Check) -> None:
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        check()
        time.sleep(min(left, HEAR_SECONDS))


class _Stream(Iterator[T]):
    """The messages of one call, waited for by a thread of its own: a wait that cannot be ended hears nothing."""

    def __init__(self, call: Messages[T], check: Check) -> None:
        self._call = call
        self._check = check
        self._arrived: SimpleQueue[tuple[T] | Exception | None] = SimpleQueue()
        self._room = threading.Semaphore(_AHEAD)
        self._closed = False
        self._first: list[T] = []
        self._ended = False
        threading.Thread(target=self._wait, name="stream", daemon=True).start()

    @classmethod
    @contextmanager
    def opened(cls, begin: Callable[[], Messages[T]], check: Check) -> Iterator[_Stream[T]]:
        """Begin a call and wait for its first message, so that a refusal shows while it can be retried."""
        stream = retrying(partial(cls._begun, begin, check), check)
        try:
            yield stream
        finally:
            stream.close()

    @classmethod
    def _begun(cls, begin: Callable[[], Messages[T]], check: Check) -> _Stream[T]:
        stream = cls(begin(), check)
        try:
            stream._first.extend(stream._next())
        except BaseException:
            stream.close()
            raise
        return stream

    def __next__(self) -> T:
        if self._first:
            return self._first.pop()
        for message in self._next():
            return message
        raise StopIteration

    def close(self) -> None:
        """Give the call up."""
        self._closed = True
        self._call.cancel()
        self._room.release()

    def _next(self) -> tuple[()] | tuple[T]:
        """Return the next message; nothing at the end."""
        if self._ended:
            return ()
        while True:
            self._check()
            try:
                arrived = self._arrived.get(timeout=HEAR_SECONDS)
            except Empty:
                continue
            self._ended = not isinstance(arrived, tuple)
            if isinstance(arrived, Exception):
                raise arrived
            self._room.release()
            return arrived or ()

    def _wait(self) -> None:
        try:
            messages = iter(self._call)
            while True:
                self._room.acquire()
                if self._closed:
                    return
                self._arrived.put((next(messages),))
        except StopIteration:
            self._arrived.put(None)
        except Exception as error:  # it belongs to who takes the messages
            self._arrived.put(error)
