"""How a child ended that did not answer: what is known of it, as an error that a program can switch on."""

from __future__ import annotations

import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from luthier.errors import LuthierError, Reason, ResourceExhausted, Unavailable

_DUMP_CHARACTERS = 8000
"""Of a stack dump: some hundred frames, the innermost of each thread first."""
_MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """How a child ended.

    Attributes:
        code: its exit code; a signal's number, negative, where a signal ended it.
        oom_kills: how many processes the kernel has ended for want of memory since the child began.
        peak_bytes: the most memory that it was seen to hold; 0: it was never looked at.
    """

    code: int
    oom_kills: int
    peak_bytes: int

    def error(self) -> LuthierError:
        """Return why the work has no result.

        OUT_OF_MEMORY where the kernel says that it ended a process for want of memory while the child ran, and the
        child was killed: the same again would end so again. All else is CRASHED, and may go well next time.
        """
        if self.code == -signal.SIGKILL and self.oom_kills:
            return ResourceExhausted(
                f"the process that did the work was ended by the kernel for want of memory{self._held()}",
                reason=Reason.OUT_OF_MEMORY,
                metadata={"peak_bytes": str(self.peak_bytes)},
            )
        if self.code >= 0:
            how, metadata = f"ended with code {self.code}", {"exit_code": str(self.code)}
        else:
            name = signal_name(-self.code)
            how, metadata = f"was ended by {name}", {"signal": name}
        if self.code == -signal.SIGKILL:
            how = f"{how}, from outside: the kernel counts no process that it ended for want of memory"
        return Unavailable(
            f"the process that did the work {how}{self._held()}", reason=Reason.CRASHED, metadata=metadata
        )

    def _held(self) -> str:
        if not self.peak_bytes:
            return ""
        whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return f"; it held up to {self.peak_bytes // _MIB} MiB of the machine's {whole // _MIB} MiB"


def signal_name(number: int) -> str:
    """Return the name of a signal, `SIGSEGV`."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def peak_bytes(pid: int) -> int:
    """Return the most memory that a process has held so far; 0 when it is gone."""
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found is not None else 0


def dumped(stacks: IO[bytes]) -> str:
    """Return what a child has written of its threads, at most some thousand characters; empty: nothing."""
    stacks.seek(0)
    text = stacks.read(_DUMP_CHARACTERS + 1).decode(errors="replace").strip()
    return text if len(text) <= _DUMP_CHARACTERS else f"{text[:_DUMP_CHARACTERS]}…"
