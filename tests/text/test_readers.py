"""Readers: every value with its line, every fault with its place, memory bounded by the record."""

from __future__ import annotations

import io
import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.text.readers import Line, read_values


def read(text: str | bytes) -> list[Line]:
    raw = text.encode() if isinstance(text, str) else text
    return list(read_values(io.BytesIO(raw)))


def numbered(lines: list[Line]) -> list[tuple[int, Any]]:
    assert [line.error for line in lines if line.error] == []
    return [(line.number, line.value) for line in lines]


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1}\n\n{"a": 2}\n',
        '{"a": 1}\r\n\r\n{"a": 2}',
        '\ufeff{"a": 1}\n \n{"a": 2}',
        '[{"a": 1},\n\n{"a": 2}]',
    ],
)
def test_values_come_with_their_line(text: str) -> None:
    assert numbered(read(text)) == [(1, {"a": 1}), (3, {"a": 2})]


@pytest.mark.parametrize("text", ["", "\n\n", "\ufeff", "[]", " [ ] "])
def test_an_empty_file_has_no_value(text: str) -> None:
    assert read(text) == []


def test_leading_blank_lines_are_counted() -> None:
    assert numbered(read('\n\n{"a": 1}')) == [(3, {"a": 1})]
    assert numbered(read('\n[\n{"a": 1}]')) == [(3, {"a": 1})]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"a": }', "Expecting value at column 7"),
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b'{"a": 1, "a": 2}', "'a' stands twice"),
        (b'{"a": "\xff"}', "UTF-8, byte 8 is 0xff"),
        (b'{"a": ' + b"[" * 100_000, "recursion"),
    ],
)
def test_a_broken_line_is_told_and_the_next_is_read(line: bytes, said: str) -> None:
    first, second = read(line + b'\n{"b": 1}\n')
    assert first.number == 1
    assert first.error is not None
    assert said in first.error
    assert first.excerpt
    assert (second.number, second.value) == (2, {"b": 1})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[{"a": 1}, {"a": ]', "element 2 of the array: must be JSON"),
        ('[{"a": 1}', "must end with ]"),
        ("[1,", "]"),
        ("[1 2]", "a comma must stand between"),
        ("[1,]", "element 2 of the array: must be JSON"),
        ("[,1]", "element 1 of the array: must be JSON"),
        ('[{"a": 1}]\n[{"a": 2}]', "nothing may follow"),
        ("[1]" + " " * (2 << 20) + "x", "nothing may follow"),
    ],
)
def test_a_broken_array_ends_with_its_error(text: str, said: str) -> None:
    last = read(text)[-1]
    assert last.error is not None
    assert said in last.error


def test_a_large_array_is_read_piece_by_piece() -> None:
    rows = [{"text": "x" * 1000, "row": row} for row in range(20_000)]
    raw = json.dumps(rows).encode()
    stream = io.BytesIO(raw)
    tracemalloc.start()
    assert [line.value["row"] for line in read_values(stream)] == list(range(20_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < len(raw) / 2


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(st.lists(json_values, max_size=6), st.sampled_from([None, 2]))
def test_an_array_reads_as_json_does(values: list[Any], indent: int | None) -> None:
    assert [line.value for line in read(json.dumps(values, indent=indent, ensure_ascii=False))] == values
