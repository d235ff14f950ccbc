"""JSON objects that are spread over several lines, as pretty printers write them."""

from __future__ import annotations

import io
import itertools
import json
from dataclasses import dataclass
from typing import BinaryIO

_FIRST_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """An object over `num_lines` lines.

    `ends`: it is whole. Otherwise `problem` says what is wrong on the last of the lines, None where the object goes
    on beyond what was read.
    """

    num_lines: int
    ends: bool
    problem: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parse:
    """How far a text is JSON: to character `position`, which is where the object `ends`, or where it breaks off."""

    position: int
    ends: bool = False
    goes_on: bool = False
    problem: str = ""


class SpreadFinder:
    """Looks for spread objects in one file. At most `limit_bytes` of each are read.

    What looking costs in vain stays in proportion to what has been read: without that a file of broken lines would
    be read again from each of them.
    """

    def __init__(self, stream: BinaryIO, limit_bytes: int) -> None:
        self._stream = stream
        self._limit_bytes = limit_bytes
        self._spent_bytes = 0

    def find(self, first: bytes) -> Spread | None:
        """Tell whether an object that begins on the line `first`, just read, is spread over the lines behind it.

        None for a line that is broken by itself. Spread is what makes the beginning of a JSON object together with
        the line behind it, which is no JSON alone. The stream is put behind an object that ends, else back to where
        it was.
        """
        start = self._stream.tell()
        if not first.lstrip().startswith(b"{") or self._spent_bytes > start:
            return None
        raw, ended = first, False
        parse, text = _Parse(position=0, goes_on=True), ""
        while parse.goes_on and not ended and len(raw) < self._limit_bytes:
            # Twice as much each time: the object is read from its beginning again.
            wanted_bytes = min(max(_FIRST_BYTES, 2 * len(raw)), self._limit_bytes)
            raw, ended = _longer(self._stream, raw, wanted_bytes)
            text = raw.decode(errors="replace")
            parse = _parsed(text)
        self._stream.seek(start)
        found = _whole(text, parse.position) if parse.ends else _unended(text, parse)
        if found is not None and found.ends:
            self._stream.seek(start + len(_lines_of(raw, found.num_lines)) - len(first))
        else:
            self._spent_bytes += len(raw)
        return found


def _lines_of(raw: bytes, count: int) -> bytes:
    return b"".join(itertools.islice(io.BytesIO(raw), count))


def _longer(stream: BinaryIO, raw: bytes, wanted_bytes: int) -> tuple[bytes, bool]:
    """Add lines until there are `wanted_bytes`; tell whether the file ended."""
    parts, size_bytes = [raw], len(raw)
    while size_bytes < wanted_bytes:
        line = stream.readline(wanted_bytes)
        if not line:
            return b"".join(parts), True
        parts.append(line)
        size_bytes += len(line)
    return b"".join(parts), False


def _parsed(text: str) -> _Parse:
    begin = len(text) - len(text.lstrip())
    try:
        return _Parse(position=_DECODER.raw_decode(text, begin)[1], ends=True)
    except json.JSONDecodeError as error:
        is_cut_text = error.msg.startswith("Invalid control character")
        goes_on = error.pos >= len(text.rstrip()) and not is_cut_text
        return _Parse(position=error.pos, goes_on=goes_on, problem=error.msg)
    except (ValueError, RecursionError) as error:
        return _Parse(position=0, problem=str(error))


def _whole(text: str, end: int) -> Spread | None:
    """Return an object that ends at a character; None when it is one line, or others stand on its last one."""
    num_lines = text.count("\n", 0, end) + 1
    rest_of_line = text[end : text.find("\n", end) + 1 or len(text)]
    return None if num_lines == 1 or rest_of_line.strip() else Spread(num_lines=num_lines, ends=True)


def _unended(text: str, parse: _Parse) -> Spread | None:
    good = text if parse.goes_on else text[: text.rfind("\n", 0, parse.position) + 1]
    lines = [line for line in good.split("\n") if line.strip()]
    if len(lines) < 2 or _is_json(lines[1]):
        return None
    if parse.goes_on:
        return Spread(num_lines=good.count("\n"), ends=False)
    return Spread(num_lines=good.count("\n") + 1, ends=False, problem=parse.problem)


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


_DECODER = json.JSONDecoder()
