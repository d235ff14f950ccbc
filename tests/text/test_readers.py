"""Readers: every value with its line, every fault with its place, memory bounded by the record."""

from __future__ import annotations

import gc
import io
import json
import re
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.text.readers import MAX_RECORD_BYTES, Line, read_values


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
        (b'{"a": ' + b"[" * 100_000, "nested at most 100 deep"),
        (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", "nested at most 100 deep"),
        (b'{"a": ' + b"1" * 4301 + b"}", "at most 4300 digits, got 4301"),
        (b'{"a": 1e999}', "in the range of float64, got 1e999"),
        (b'{"a": "cut', "Invalid control character|Unterminated string"),
    ],
)
def test_a_broken_line_is_told_and_the_next_is_read(line: bytes, said: str) -> None:
    first, second = read(line + b'\n{"b": 1}\n')
    assert first.number == 1
    assert first.error is not None
    assert re.search(said, first.error)
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
        ('["' + "x" * MAX_RECORD_BYTES + '"]', f"smaller than {MAX_RECORD_BYTES} bytes"),
        ("[" + "[" * 101 + "]" * 101 + "]", "nested at most 100 deep"),
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


def test_a_line_that_is_too_long_is_told_and_the_next_is_read() -> None:
    first, second = read(b'{"a": "' + b"x" * (2 * MAX_RECORD_BYTES) + b'"}\n{"b": 1}\n')
    assert (first.number, first.reason, first.final) == (1, "RECORD_TOO_LONG", False)
    assert str(MAX_RECORD_BYTES) in str(first.error)
    assert (second.number, second.value) == (2, {"b": 1})


def test_what_is_nested_a_hundred_deep_is_read() -> None:
    assert read(b'{"a": ' + b"[" * 99 + b"]" * 99 + b"}")[0].error is None


RECORD = {
    "messages": [{"role": "user", "content": "q\nr"}, {"role": "assistant", "content": "a"}],
    "n": [1, 2],
}


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(RECORD, indent=2),
        "\n" + json.dumps(RECORD, indent="\t") + "\n\n",
        json.dumps(RECORD, indent=4).replace("\n", "\r\n"),
        "\n".join(json.dumps(RECORD, indent=1) for _ in range(3)),
        json.dumps({"data": [RECORD] * 200}, indent=1),
        '{"messages":\n' + json.dumps(RECORD["messages"]) + "}",
    ],
)
def test_pretty_printed_json_is_named_once(text: str) -> None:
    (line,) = read(text)
    assert line.reason == "PRETTY_PRINTED_JSON"
    assert line.final
    begins = len(text) - len(text.lstrip())
    assert line.number == 1 + begins
    ends = (
        line.number
        + text[begins:].split("}\n{", maxsplit=1)[0].rstrip().count("\n")
        + (text.count("}\n{") > 0)
    )
    assert f"one object over lines {line.number} to {ends}" in str(line.error)
    assert "on a line of its own" in str(line.error)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{\n "a": 1,\n "b": [\n  1,\n', "line 1 and those after it."),
        ('{\n "a": 1,\n "b": 2,\n}\n', "at line 4 it is no JSON: Expecting property name"),
        ("{\n" + '"a": 1,\n' * (MAX_RECORD_BYTES // 8), "line 1 and those after it."),
    ],
)
def test_pretty_printed_json_that_does_not_end_is_named_once(text: str, said: str) -> None:
    (line,) = read(text)
    assert line.reason == "PRETTY_PRINTED_JSON"
    assert said in str(line.error)


def test_a_spread_object_among_lines_is_one_error() -> None:
    text = '{"a": 1}\n' + json.dumps(RECORD, indent=2) + '\n{"b": 2}\n'
    lines = read(text)
    assert [(line.number, line.value) for line in lines] == [(1, {"a": 1}), (2, None), (18, {"b": 2})]
    assert lines[1].reason == "PRETTY_PRINTED_JSON"
    assert not lines[1].final


@pytest.mark.parametrize("broken", ['{"messages": [', "{", '{"a": "b', '{"a": 1,', "{nope", '{"a": 1} x'])
def test_a_line_that_breaks_off_is_no_pretty_printed_json(broken: str) -> None:
    for text in (broken, f'{broken}\n{{"b": 1}}\n{{"c": 2}}\n', f'{{"z": 0}}\n{broken}\n{{"b": 1}}\n'):
        lines = read(text)
        assert [line.reason for line in lines if line.error] == ["INVALID_JSON"]
        assert len(lines) == text.count("\n") or broken == text


@given(st.dictionaries(st.text(min_size=1), json_values, min_size=1, max_size=3), st.sampled_from([1, "\t"]))
def test_whatever_a_pretty_printer_writes_is_named(value: dict[str, Any], indent: int | str) -> None:
    (line,) = read(json.dumps(value, indent=indent, ensure_ascii=False))
    assert line.reason == "PRETTY_PRINTED_JSON"


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ('{"a": 1}'.encode("utf-16"), "UTF-16 text; save it as UTF-8"),
        (b"\x1f\x8b\x08\x00", "gzip"),
        (b"PK\x03\x04rest", "zip"),
        (b"PAR1rest", "Parquet"),
    ],
)
def test_a_file_of_another_kind_is_named_once(raw: bytes, said: str) -> None:
    (line,) = read(raw)
    assert said in str(line.error)
    assert line.final


LONG = [
    lambda n: "{" + ",".join(f'"k{i}":0' for i in range(n // 10)) + ',"k0":1}',
    lambda n: " " * n + "{}",
    lambda n: "\n" * n + "{}",
    lambda n: '{"a":1}' + "\n" * n + '{"a":1}',
    lambda n: "[" + " " * n + "1]",
    lambda n: "[" + "1," * (n // 10) + "1]",
    lambda n: '{"a":[' + "[]," * (n // 3) + "1]}",
    lambda n: '{"a":' + "9" * n + "}",
    lambda n: '[{"a":"' + "x" * n + '"}]',
    lambda n: '{"x":1}\n' + '{"a":[1,\n' * (n // 50),
    lambda n: "{\n" + '"a":1,\n' * (n // 8),
    lambda n: "{\n" * (n // 20),
]
"""Texts of so many bytes, each hard for a reader that looks at some of them again."""


@pytest.mark.parametrize("made", LONG)
def test_reading_takes_time_in_proportion_to_the_bytes(made: Callable[[int], str]) -> None:
    def seconds(num_bytes: int) -> float:
        raw = made(num_bytes).encode()
        measured = []
        gc.disable()  # it looks at all that the other tests have left, the more often the more is read
        for _ in range(2):
            began = time.process_time()
            read(raw)
            measured.append(time.process_time() - began)
        gc.enable()
        return min(measured)

    # Quadratic time would be 16 times as much; 10 ms are below what this clock can tell under load.
    assert seconds(400_000) < 8 * seconds(100_000) + 0.01


@pytest.mark.parametrize("made", LONG)
def test_a_megabyte_is_read_within_a_second(made: Callable[[int], str]) -> None:
    """Of a processor, of which a busy machine takes no more."""
    raw = made(1_000_000).encode()
    seconds = []
    for _ in range(2):
        began = time.process_time()
        read(raw)
        seconds.append(time.process_time() - began)
    assert min(seconds) < 1.0
