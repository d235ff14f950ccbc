"""What graders read of records is found before there is an answer."""

from __future__ import annotations

import json
from typing import Any

import pytest

from luthier.errors import Reason
from luthier.grading.item_fields import ItemFields
from luthier.grading.outcomes import GradingError
from luthier.v1.grader_pb2 import Grader, MultiGrader, NumberMatchGrader, RegexGrader, RemoteGrader

NUMBER = Grader(
    name="right",
    number_match=NumberMatchGrader(input="{{sample.output_text}}", reference="{{item.answer.value[-1]}}"),
)
WORDS = Grader(regex=RegexGrader(input="{{item.prefix}} {{sample.output_json.a}}", pattern="a"))
MULTI = Grader(multi=MultiGrader(graders={"number": NUMBER, "words": WORDS}, calculate_output="number"))


@pytest.mark.parametrize(
    ("grader", "item", "message"),
    [
        (NUMBER, {"answer": {"value": [1, 2]}}, None),
        (
            NUMBER,
            {"question": "?"},
            "grader right: reference names {{item.answer.value[-1]}}, but there is no field 'answer' in item, which "
            "has 'question'",
        ),
        (
            NUMBER,
            {"answer": {"value": []}},
            "grader right: reference names {{item.answer.value[-1]}}, but there is no [-1] in item.answer.value, which "
            "is a list of 0",
        ),
        (WORDS, {"prefix": ""}, None),
        (
            WORDS,
            {},
            "grader regex: input names {{item.prefix}}, but there is no field 'prefix' in item, which has no",
        ),
        (MULTI, {"answer": {"value": [1]}, "prefix": "a"}, None),
        (MULTI, {"answer": {"value": [1]}}, "grader words: input names {{item.prefix}}"),
    ],
)
def test_a_field_that_a_record_has_not_is_named(grader: Grader, item: Any, message: str | None) -> None:
    fields = ItemFields(grader)
    assert fields
    if message is None:
        fields.require(json.dumps(item))
        return
    with pytest.raises(GradingError) as caught:
        fields.require(json.dumps(item))
    assert caught.value.reason == Reason.TEMPLATE_FIELD_MISSING
    assert caught.value.message.startswith(message)


def test_what_reads_the_answer_alone_or_is_asked_elsewhere_reads_no_field() -> None:
    alone = Grader(regex=RegexGrader(input="{{sample.output_text}} {{sample.output_json.item}}", pattern="a"))
    for grader in (alone, Grader(remote=RemoteGrader(address="127.0.0.1:1"))):
        fields = ItemFields(grader)
        assert not fields
        fields.require("[]")


def test_a_record_that_is_no_object_is_named() -> None:
    with pytest.raises(GradingError, match="grader right: the record must be a JSON object"):
        ItemFields(NUMBER).require("[1]")
