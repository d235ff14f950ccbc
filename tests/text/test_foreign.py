"""Shapes of other tools: named where they are refused, with what to do."""

from __future__ import annotations

from typing import Any

import pytest

from luthier.text.formats import Format, RecordError, UnknownFormatError, detect, parse_record

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (
            {"dialog": [{"from": "human", "value": "q"}]},
            "ShareGPT under another name: rename dialog to conversations",
        ),
        ({"dialog": [{"role": "user", "content": "q"}]}, "another name: rename dialog to messages"),
        ({"text": "t"}, "plain text: .*with an empty prompt"),
        (
            {"question": "q", "response": "a", "id": 3},
            "pairs of question and response: rename question to instruction",
        ),
        ({"instruction": "q", "response": "a"}, "rename instruction to instruction and response to output"),
        ({"input": "q", "output": "a"}, "pairs of input and output"),
        ({"custom_id": "1", "body": {"messages": []}}, "Batch API"),
        ({"contents": [{"role": "user", "parts": []}]}, "Gemini"),
        (
            {"train": [{"messages": [USER, ASSISTANT]}]},
            "holds the records in 'train': write that list by itself",
        ),
        (
            {"data": [{"prompt": "q", "chosen": "a", "rejected": "b"}]},
            "holds the records in 'data': write that list by itself",
        ),
    ],
)
def test_shapes_of_other_tools_are_named_with_what_to_do(value: dict[str, Any], said: str) -> None:
    with pytest.raises(UnknownFormatError, match=f"looks like .*{said}"):
        detect([value])
    with pytest.raises(RecordError, match=f"must be there.* looks like .*{said}"):
        parse_record(value, Format.OPENAI_CHAT)


@pytest.mark.parametrize("value", [{"chosen": [USER, ASSISTANT]}, {"a": 1}, {"a": [{"b": 1}]}, {"a": []}, 3])
def test_a_shape_that_nobody_knows_has_no_name(value: object) -> None:
    with pytest.raises(UnknownFormatError) as caught:
        detect([value])
    assert "looks like" not in str(caught.value)
