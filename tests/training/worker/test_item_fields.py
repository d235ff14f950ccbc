"""Records that lack what a grader reads are named by file and line before anything is drawn."""

from __future__ import annotations

from typing import Any

import pyarrow
import pytest

from luthier.errors import Cancelled, InvalidArgument, Reason
from luthier.training.worker.item_fields import ItemCheck
from luthier.v1.grader_pb2 import Grader, NumberMatchGrader, RegexGrader

ANSWER = Grader(
    name="right", number_match=NumberMatchGrader(input="{{sample.output_text}}", reference="{{item.answer}}")
)


def batch(first: int, *records: str, with_places: bool = True) -> Any:
    rows = list(range(first, first + len(records)))
    columns: dict[str, list[Any]] = {"row": rows, "record": list(records)}
    if with_places:
        columns |= {"filename": ["a.jsonl"] * len(rows), "line": [row + 1 for row in rows]}
    return pyarrow.RecordBatch.from_pydict(columns)


def nothing() -> None:
    """Everything is wanted."""


def test_records_that_have_all_that_is_read_pass() -> None:
    check = ItemCheck(ANSWER, nothing)
    check.add(batch(0, '{"answer": 1}', '{"answer": ""}'))
    check.require()


def test_the_first_that_lacks_a_field_is_named_and_all_are_counted() -> None:
    check = ItemCheck(ANSWER, nothing)
    check.add(batch(0, '{"answer": 1}', '{"question": 1}'))
    check.add(batch(2, "{}", '{"answer": 2}'))
    with pytest.raises(InvalidArgument) as caught:
        check.require()
    assert caught.value.reason == Reason.TEMPLATE_FIELD_MISSING
    assert caught.value.message == (
        "records must have what the grader reads of them, those of 2 of 4 prompts have not; the first is a.jsonl "
        "line 2: grader right: reference names {{item.answer}}, but there is no field 'answer' in item, which has "
        "'question'"
    )
    assert caught.value.metadata == {"filename": "a.jsonl", "line": "2", "row": "1"}


def test_rows_without_a_place_are_named_by_their_number() -> None:
    check = ItemCheck(ANSWER, nothing)
    check.add(batch(7, "{}", with_places=False))
    with pytest.raises(InvalidArgument, match="the first is row 7: grader right"):
        check.require()


def test_a_grader_that_reads_no_field_looks_at_nothing() -> None:
    check = ItemCheck(Grader(regex=RegexGrader(input="{{sample.output_text}}", pattern="a")), nothing)
    check.add(batch(0, "no JSON at all"))
    check.require()


def test_looking_ends_when_it_is_no_longer_wanted() -> None:
    def unwanted() -> None:
        raise Cancelled("asked to stop")

    with pytest.raises(Cancelled):
        ItemCheck(ANSWER, unwanted).add(batch(0, "{}"))
