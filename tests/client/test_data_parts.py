"""Parts of a train split: nested, and read again as the very records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from luthier.client.data_parts import RecordParts, written
from luthier.text.formats import Format, parse_record
from luthier.text.records import (
    ChatPair,
    ChatRecord,
    CompletionPair,
    CompletionRecord,
    Message,
    Record,
    record_id,
    record_to_json,
)
from luthier.v1.dataset_pb2 import DatasetFormat

ASKED = Message(role="user", content="what?")
TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}


def said(text: str, weight: float | None = None) -> Message:
    return Message(role="assistant", content=text, weight=weight)


RECORDS: list[Record] = [
    ChatRecord(messages=(Message(role="system", content="Be short."), ASKED, said("Zürich", 1.0))),
    ChatRecord(messages=(ASKED, said("a", 0.0), ASKED, said("b", 1.0)), tools=(TOOL,)),
    ChatRecord(messages=(ASKED, said("bad")), label=False),
    CompletionRecord(prompt="1 + 1 =", completion=" 2"),
    CompletionRecord(prompt="1 + 1 =", completion=" 3", label=False),
    ChatPair(messages=(ASKED,), chosen=(said("good"),), rejected=(said("bad"),)),
    CompletionPair(prompt="1 + 1 =", chosen=" 2", rejected=" 3"),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_a_line_is_read_as_the_record_that_was_written(record: Record) -> None:
    found_format, line = written(record_to_json(record))
    name = DatasetFormat.Name(found_format).removeprefix("DATASET_FORMAT_")
    assert parse_record(json.loads(line), Format(name)) == record


def parts_of(folder: Path, seed: int) -> RecordParts:
    parts = RecordParts(folder, seed)
    for number in range(100):
        record = CompletionRecord(prompt=f"p {number}", completion="c")
        parts.add(record_id(record), record_to_json(record))
    return parts


def read(parts: RecordParts, count: int) -> list[str]:
    ((found_format, path),) = parts.write(count, f"part-{count}")
    assert DatasetFormat.Name(found_format) == "DATASET_FORMAT_PROMPT_COMPLETION"
    return [json.loads(line)["prompt"] for line in path.read_text().splitlines()]


def test_a_smaller_part_lies_within_a_larger_one_in_the_order_of_the_records(tmp_path: Path) -> None:
    parts = parts_of(tmp_path, 0)
    ten, thirty, every = read(parts, 10), read(parts, 30), read(parts, 100)
    assert (len(ten), len(thirty), len(every)) == (10, 30, 100)
    assert set(ten) < set(thirty)
    assert every == [f"p {number}" for number in range(100)]
    assert thirty == [one for one in every if one in set(thirty)]
    assert ten != every[:10]
    parts.close()
    (other := tmp_path / "other").mkdir()
    again = parts_of(other, 1)
    assert read(again, 10) != ten
    again.close()


def test_each_format_is_a_file(tmp_path: Path) -> None:
    parts = RecordParts(tmp_path, 0)
    for record in RECORDS:
        parts.add(record_id(record), record_to_json(record))
    assert len(parts.write(len(RECORDS), "all")) == 5
    parts.close()
