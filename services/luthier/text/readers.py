"""Files of JSON, one value at a time: JSON lines, or one JSON array. Memory is bounded by the largest record.

Time is linear in the bytes of a file, whatever they are: files come from users.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

from luthier.text.spread import Spread, SpreadFinder

_CHUNK_BYTES = 1 << 20
_EXCERPT_CHARACTERS = 80
MAX_RECORD_BYTES = 8 << 20
"""Longest record as it stands in a file. A hostile one takes some thirty times that in memory."""
MAX_DEPTH = 100
"""Deepest nesting of lists and objects: whoever reads a record later must be able to as well."""
MAX_DIGITS = 4300
"""Longest whole number; Python reads none that is longer."""
_SPACE = re.compile(r"[ \t\r\n]*")
_TOO_LONG = f"a record must be smaller than {MAX_RECORD_BYTES} bytes"
_TOO_DEEP = f"lists and objects must be nested at most {MAX_DEPTH} deep"
_OTHER_FILES = (
    (codecs.BOM_UTF16_LE, "UTF-16 text; save it as UTF-8"),
    (codecs.BOM_UTF16_BE, "UTF-16 text; save it as UTF-8"),
    (b"\x1f\x8b", "a gzip file; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a zstd file; unpack it first"),
    (b"PK\x03\x04", "a zip archive; unpack it first"),
    (b"PAR1", "a Parquet file; write its rows as JSON lines"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A JSON value and the line it begins at, from 1; or, with `error` set, why there is no JSON value.

    `reason` is a code that a program can switch on. `final`: nothing after the error can be read.
    """

    number: int
    value: Any = None
    error: str | None = None
    reason: str = "INVALID_JSON"
    excerpt: str = ""
    final: bool = False


def read_values(stream: BinaryIO) -> Iterator[Line]:
    """Yield the values of a seekable file: the elements of a JSON array, else one value a line.

    Blank lines and a byte order mark are passed over. A line that is no JSON, holds NaN, Infinity or a number
    beyond the range of float64, repeats a key, is nested too deep, too long, or no UTF-8 is yielded with its error.
    An object that is spread over several lines is one error; where it is the first of the file it ends the reading,
    as does the first such place in an array.
    """
    other = _other_file(stream)
    if other is not None:
        yield Line(number=1, error=f"must be JSON, the file begins as {other}", final=True)
        return
    number = _skip_space(stream)
    first = stream.read(1)
    if first == b"[":
        yield from _array(stream, number)
    elif first:
        stream.seek(-1, 1)
        yield from _lines(stream, number)


def read_json(text: str) -> Any:
    """Return the value of a JSON text, as strictly as those of a file. Raises ValueError, which says what is wrong."""
    value, end = _decode(text, _after_space(text, 0))
    if text[end:].strip():
        raise ValueError(f"Extra data at column {end + 1}")
    return value


def _other_file(stream: BinaryIO) -> str | None:
    head = stream.read(4)
    stream.seek(-len(head), 1)
    return next((what for mark, what in _OTHER_FILES if head.startswith(mark)), None)


def _skip_space(stream: BinaryIO) -> int:
    """Put the stream at its first byte that is no white space; return the number of that byte's line."""
    number = 1
    mark = stream.read(len(codecs.BOM_UTF8))
    if mark != codecs.BOM_UTF8:
        stream.seek(-len(mark), 1)
    while chunk := stream.read(_CHUNK_BYTES):
        kept = chunk.lstrip(b" \t\r\n")
        number += chunk.count(b"\n", 0, len(chunk) - len(kept))
        if kept:
            stream.seek(-len(kept), 1)
            return number
    return number


def _lines(stream: BinaryIO, number: int) -> Iterator[Line]:
    finder, is_first = SpreadFinder(stream, MAX_RECORD_BYTES), True
    for raw in iter(partial(stream.readline, MAX_RECORD_BYTES), b""):
        if raw.isspace():
            number += 1
            continue
        if len(raw) >= MAX_RECORD_BYTES:
            _skip_line(stream, raw)
            yield Line(number=number, error=_TOO_LONG, reason="RECORD_TOO_LONG", excerpt=_excerpt(raw))
            number, is_first = number + 1, False
            continue
        line = _read_line(raw.strip(), number)
        found = finder.find(raw) if line.error else None
        if found is not None and (found.ends or is_first):
            line = _spread_line(line, found, is_final=is_first)
        yield line
        if line.final:
            return
        number += found.num_lines if found is not None and found.ends else 1
        is_first = False


def _skip_line(stream: BinaryIO, raw: bytes) -> None:
    while raw and not raw.endswith(b"\n"):
        raw = stream.readline(_CHUNK_BYTES)


def _spread_line(line: Line, found: Spread, *, is_final: bool) -> Line:
    last = line.number + found.num_lines - 1
    place = f"lines {line.number} to {last}" if found.ends else f"line {line.number} and those after it"
    problem = "" if found.problem is None else f", and at line {last} it is no JSON: {found.problem}"
    return Line(
        number=line.number,
        error=f"must be one record a line; this is pretty-printed JSON, one object over {place}{problem}. Write each "
        "record on a line of its own (jq -c . FILE), or all of them as one JSON array",
        reason="PRETTY_PRINTED_JSON",
        excerpt=line.excerpt,
        final=is_final,
    )


def _excerpt(raw: bytes) -> str:
    return raw[:_EXCERPT_CHARACTERS].decode(errors="replace")


def _read_line(raw: bytes, number: int) -> Line:
    try:
        text = raw.decode()
        value, end = _decode(text, 0)
        if end == len(text):
            return Line(number=number, value=value)
        problem = f"must be JSON: Extra data at column {end + 1}"
    except UnicodeDecodeError as error:
        problem = f"must be UTF-8, byte {error.start + 1} is 0x{raw[error.start]:02x}"
    except json.JSONDecodeError as error:
        problem = f"must be JSON: {error.msg} at column {error.colno}"
    except ValueError as error:
        problem = f"must be JSON: {error}"
    return Line(number=number, error=problem, excerpt=_excerpt(raw))


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
                error = "nothing may follow the ] of the array"
                yield Line(number=number, error=error, excerpt=excerpt, final=True)
            return
        if buffer.startswith(",", position) and not wants_value:
            position, wants_value = position + 1, True
            continue
        value, end = _element(buffer, position, ended)
        if end and not wants_value:
            value = Line(number=0, error="must be JSON: a comma must stand between two elements")
        if isinstance(value, Line):
            error = f"element {num_values + 1} of the array: {value.error}"
            yield Line(number=number, error=error, reason=value.reason, excerpt=excerpt, final=True)
            return
        if end:
            yield Line(number=number, value=value)
            number += buffer.count("\n", position, end)
            position, wants_value, num_values = end, False, num_values + 1
            continue
        # As much again as did not suffice: an element is decoded from its beginning each time.
        chunk = stream.read(min(max(_CHUNK_BYTES, len(buffer) - position), MAX_RECORD_BYTES))
        ended = not chunk
        try:
            buffer, position = buffer[position:] + decoder.decode(chunk, final=ended), 0
        except UnicodeDecodeError as error:
            yield Line(number=number, error=f"must be UTF-8: {error.reason}", excerpt=excerpt, final=True)
            return


def _holds_more(stream: BinaryIO) -> bool:
    return any(chunk.strip() for chunk in iter(lambda: stream.read(_CHUNK_BYTES), b""))


def _after_space(buffer: str, position: int) -> int:
    match = _SPACE.match(buffer, position)
    return match.end() if match else position


def _element(buffer: str, position: int, ended: bool) -> tuple[Any, int]:
    """Return the value at a position and where it ends; end 0 when more is needed; a Line with an error."""
    if position == len(buffer):
        return (Line(number=0, error="the array must end with ]"), 0) if ended else (None, 0)
    try:
        value, end = _decode(buffer, position)
        if end - position >= MAX_RECORD_BYTES:
            return Line(number=0, error=_TOO_LONG, reason="RECORD_TOO_LONG"), 0
    except json.JSONDecodeError as error:
        if not ended and len(buffer) - position <= MAX_RECORD_BYTES:
            return None, 0
        if not ended and (error.msg.startswith("Unterminated") or error.pos >= position + MAX_RECORD_BYTES):
            return Line(number=0, error=_TOO_LONG, reason="RECORD_TOO_LONG"), 0
        return Line(number=0, error=f"must be JSON: {error.msg}"), 0
    except ValueError as error:
        return Line(number=0, error=f"must be JSON: {error}"), 0
    # A number at the very end of the buffer may go on in the next chunk.
    if end == len(buffer) and not ended and not isinstance(value, dict | list | str):
        return None, 0
    return value, end


def _decode(text: str, start: int) -> tuple[Any, int]:
    """Return the value at a position and where it ends. Raises ValueError for what is no JSON or too deep."""
    try:
        value, end = _DECODER.raw_decode(text, start)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    if text.count("[", start, end) + text.count("{", start, end) > MAX_DEPTH and _is_deep(value):
        raise ValueError(_TOO_DEEP)
    return value, end


def _is_deep(value: Any) -> bool:
    level: list[dict[str, Any] | list[Any]] = [value]
    for _ in range(MAX_DEPTH):
        children = (node.values() if isinstance(node, dict) else node for node in level)
        level = [child for some in children for child in some if isinstance(child, dict | list)]
    return bool(level)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _whole_number(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a whole number must have at most {MAX_DIGITS} digits, got {len(digits)}")
    return int(digits)


def _finite_number(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"a number must be in the range of float64, got {digits[:_EXCERPT_CHARACTERS]}")
    return number


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key[:_EXCERPT_CHARACTERS]!r} stands twice in one object")
            seen.add(key)
    return values


_DECODER = json.JSONDecoder(
    parse_constant=_refuse_constant,
    parse_int=_whole_number,
    parse_float=_finite_number,
    object_pairs_hook=_refuse_duplicates,
)
