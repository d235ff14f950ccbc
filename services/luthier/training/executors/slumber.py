"""Whether a thread sleeps in a wait that nothing of its own process will end: a deadlock, seen from within.

A rank whose thread waits for a lock that nobody gives back lives, as far as anybody sees: another thread of it beats.
A long step is no sign of it, and the kernel tells the two apart. What is not sure is no such sleep: a thread that runs,
reads, writes or wakes up now and then, one that waits while another of its process works or touches a disk, a process
that has started others, a kernel that does not say.
"""

from __future__ import annotations

import platform
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

_TASKS = Path("/proc/self/task")
_BUSY_SHARE = 0.05
"""Of the time: what a process that works uses of a processor at least. Threads that beat and listen use far less."""
_LOOKS = 24
"""In one sleep: more than who judges it takes to."""
_FUTEX: Mapping[str, frozenset[int]] = {
    "x86_64": frozenset({202, 449}),
    "aarch64": frozenset({98, 449}),
}
"""System calls by which a thread waits for another one of its process, by machine: futex, futex_waitv."""
_IDLE: Mapping[str, frozenset[int]] = {
    # read, poll, select, nanosleep, accept, recvfrom, recvmsg; clock_nanosleep, epoll_wait, pselect6, ppoll,
    # epoll_pwait, accept4, epoll_pwait2.
    "x86_64": _FUTEX["x86_64"] | {0, 7, 23, 35, 43, 45, 47, 230, 232, 270, 271, 281, 288, 441},
    "aarch64": _FUTEX["aarch64"] | {22, 63, 72, 73, 101, 115, 202, 207, 212, 242, 441},
}
"""Those, and others in which a thread waits for something from outside: never for a disk."""


class Slumber:
    """Looks at the thread that makes it, again and again, from another one, which looks at all the others too.

    Who watches the process takes what it reads for work. So nothing is read while the thread runs now and then, and
    little in one sleep of it: what was found by then stays.
    """

    def __init__(self) -> None:
        self._task = _TASKS / str(threading.get_native_id())
        self._clock = time.pthread_getcpuclockid(threading.get_ident())
        machine = platform.machine()
        self._futex, self._idle = _FUTEX.get(machine, frozenset()), _IDLE.get(machine, frozenset())
        self._ran = 0
        self._num_looks = 0
        self._lasts = False
        self._used, self._looked_at = time.process_time(), time.monotonic()

    def lasts(self) -> bool:
        """Whether the thread has slept since it was last asked of, for nobody that works."""
        used, now = time.process_time(), time.monotonic()
        is_busy = used - self._used > _BUSY_SHARE * (now - self._looked_at)
        self._used, self._looked_at = used, now
        if self._has_run():
            self._num_looks, self._lasts = 0, False
        elif is_busy:
            return False
        elif self._num_looks < _LOOKS:
            self._num_looks += 1
            self._lasts = self._found()
        return self._lasts

    def _has_run(self) -> bool:
        try:
            ran, before = time.clock_gettime_ns(self._clock), self._ran
        except OSError:  # it has ended
            return True
        self._ran = ran
        return ran != before

    def _found(self) -> bool:
        try:
            return (
                self._waits(self._task, self._futex)
                and not any(_children())
                and all(self._waits(task, self._idle) for task in self._others())
            )
        except OSError:
            return False

    def _others(self) -> Iterator[Path]:
        own = {self._task.name, str(threading.get_native_id())}
        return (task for task in _TASKS.iterdir() if task.name not in own)

    @staticmethod
    def _waits(task: Path, calls: frozenset[int]) -> bool:
        """Whether a thread is in one of some system calls; one that runs is in none, also where it is about to."""
        if (task / "stat").read_text().rpartition(")")[2].split()[0] != "S":
            return False
        number = (task / "syscall").read_text().split()[0]
        return number.isdecimal() and int(number) in calls


def _children() -> Iterator[str]:
    """Yield the processes that threads of this one have started and not waited for."""
    for task in _TASKS.iterdir():
        yield from (task / "children").read_text().split()
