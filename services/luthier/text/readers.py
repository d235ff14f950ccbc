"""Files of JSON, one value at a time: JSON lines, or one JSON array. Memory is bounded by the largest record."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

_CHUNK_BYTES = 1 << 20
_EXCERPT_CHARACTERS = 80
MAX_RECORD_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A JSON value and the line it begins at, from 1; or, with `error` set, why the line is no JSON value."""

    number: int
    value: Any = None
    error: str | None = None
    excerpt: str = ""


def read_values(stream: BinaryIO) -> Iterator[Line]:
    """Yield the values of a file: the elements of a JSON array, else one value a line.

    Blank lines and a byte order mark are passed over. A line that is no JSON, holds NaN or Infinity, repeats a
    key, or is no UTF-8 is yielded with its error; in an array the first such place ends the reading.
    """
    first, number = stream.read(1), 1
    while first and first in b" \t\r\n\xef\xbb\xbf":
        number += first == b"\n"
        first = stream.read(1)
    yield from _array(stream, number) if first == b"[" else _lines(stream, first, number)


def _lines(stream: BinaryIO, begun: bytes, number: int) -> Iterator[Line]:
    while True:
        raw = begun + stream.readline(MAX_RECORD_BYTES)
        begun = b""
        if not raw:
            return
        if len(raw) >= MAX_RECORD_BYTES:
            limit = f"a record must be smaller than {MAX_RECORD_BYTES} bytes"
            yield Line(number=number, error=limit, excerpt=raw[:_EXCERPT_CHARACTERS].decode(errors="replace"))
            return
        if raw.strip():
            yield _read_line(raw.strip(), number)
        number += 1


def _read_line(raw: bytes, number: int) -> Line:
    excerpt = raw[:_EXCERPT_CHARACTERS].decode(errors="replace")
    try:
        return Line(number=number, value=_DECODER.decode(raw.decode()))
    except UnicodeDecodeError as error:
        problem = f"must be UTF-8, byte {error.start + 1} is 0x{raw[error.start]:02x}"
    except json.JSONDecodeError as error:
        problem = f"must be JSON: {error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:
        problem = f"must be JSON: {error}"
    return Line(number=number, error=problem, excerpt=excerpt)


def _array(stream: BinaryIO, number: int) -> Iterator[Line]:
    """Read the elements of an array whose bracket has been read, decoding as little ahead as possible."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    buffer, position, ended, wants_value, num_values = "", 0, False, True, 0
    while True:
        start = _after_space(buffer, position)
        number += buffer.count("\n", position, start)
        position = start
        excerpt = buffer[position : position + _EXCERPT_CHARACTERS]
        if buffer.startswith("]", position) and not (wants_value and num_values):
            if buffer[position + 1 :].strip() or decoder.getstate()[0] or _holds_more(stream):
                yield Line(number=number, error="nothing may follow the ] of the array", excerpt=excerpt)
            return
        if buffer.startswith(",", position) and not wants_value:
            position, wants_value = position + 1, True
            continue
        value, end = _element(buffer, position, ended)
        if end and not wants_value:
            value = Line(number=0, error="must be JSON: a comma must stand between two elements")
        if isinstance(value, Line):
            error = f"element {num_values + 1} of the array: {value.error}"
            yield Line(number=number, error=error, excerpt=excerpt)
            return
        if end:
            yield Line(number=number, value=value)
            number += buffer.count("\n", position, end)
            position, wants_value, num_values = end, False, num_values + 1
            continue
        chunk = stream.read(_CHUNK_BYTES)
        ended = not chunk
        try:
            buffer, position = buffer[position:] + decoder.decode(chunk, final=ended), 0
        except UnicodeDecodeError as error:
            yield Line(number=number, error=f"must be UTF-8: {error.reason}", excerpt=excerpt)
            return


def _holds_more(stream: BinaryIO) -> bool:
    return any(chunk.strip() for chunk in iter(lambda: stream.read(_CHUNK_BYTES), b""))


def _after_space(buffer: str, position: int) -> int:
    while position < len(buffer) and buffer[position] in " \t\r\n":
        position += 1
    return position


def _element(buffer: str, position: int, ended: bool) -> tuple[Any, int]:
    """Return the value at a position and where it ends; end 0 when more is needed; a Line with an error."""
    if position == len(buffer):
        return (Line(number=0, error="the array must end with ]"), 0) if ended else (None, 0)
    try:
        value, end = _DECODER.raw_decode(buffer, position)
    except json.JSONDecodeError as error:
        if ended or len(buffer) - position > MAX_RECORD_BYTES:
            return Line(number=0, error=f"must be JSON: {error.msg}"), 0
        return None, 0
    except (ValueError, RecursionError) as error:
        return Line(number=0, error=f"must be JSON: {error}"), 0
    # A number at the very end of the buffer may go on in the next chunk.
    if end == len(buffer) and not ended and not isinstance(value, dict | list | str):
        return None, 0
    return value, end


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return values


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_refuse_duplicates)
