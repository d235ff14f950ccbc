"""A network that is cut for real: the kernel drops what comes for a process, and neither end is told."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from contextlib import suppress
from pathlib import Path

_PIDFD_GETFD = 438
_SO_ATTACH_FILTER = 26
_LET_NOTHING_IN = struct.pack("HBBI", 0x06, 0, 0, 0)
"""BPF_RET | BPF_K: of every packet no byte is passed on."""


def cut_off(pid: int) -> int:
    """Let no packet reach a process any more, or an acknowledgement; returns how many sockets it has for them.

    They stay open and writable, as when a cable is pulled. What it shares with the process that it was forked from is
    left alone. The process is this one or one that this one started.
    """
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    inherited = set(_sockets(parent).values())
    own = [number for number, name in _sockets(pid).items() if name not in inherited]
    handle = os.pidfd_open(pid)
    try:
        return sum(_is_cut(handle, number) for number in own)
    finally:
        os.close(handle)


def _sockets(pid: int) -> dict[int, str]:
    """Return what a process has open of them, by descriptor."""
    found = {}
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            name = str(path.readlink())
            if name.startswith("socket:"):
                found[int(path.name)] = name
    return found


def _is_cut(handle: int, number: int) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    copy = libc.syscall(_PIDFD_GETFD, handle, number, 0)
    if copy < 0:
        raise OSError(ctypes.get_errno(), f"descriptor {number} of another process cannot be had")
    with socket.socket(fileno=copy) as own:
        if own.family not in {socket.AF_INET, socket.AF_INET6}:
            return False
        code = ctypes.create_string_buffer(_LET_NOTHING_IN)
        own.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", 1, ctypes.addressof(code)))
        return True
