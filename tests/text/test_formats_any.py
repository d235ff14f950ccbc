"""Whatever a record holds, it is read or refused by name."""

from __future__ import annotations

import contextlib
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from tests.text.test_formats import CALL, NULL_KEYS

from luthier.text.formats import Format, RecordError, UnknownFormatError, detect, parse_record
from luthier.text.records import (
    record_from_json,
    record_to_json,
)

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 2) | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ["role", "content", "text", "type", "from", "value", *NULL_KEYS.split()]
TURNS = st.dictionaries(
    st.sampled_from(FIELDS),
    JSON_VALUES
    | st.sampled_from(["user", "assistant", "tool", "function", CALL, [CALL]])
    | st.sampled_from(["human", "gpt", "function_call", "observation", '{"name": "f", "arguments": {}}']),
)
RECORD_KEYS = (
    "messages tools functions parallel_tool_calls prompt completion instruction output input system history "
    "conversations chosen rejected label question answer preferred_output non_preferred_output id"
)


@given(
    st.dictionaries(
        st.sampled_from(RECORD_KEYS.split()),
        st.lists(TURNS, max_size=3)
        | TURNS
        | st.dictionaries(st.just("messages"), st.lists(TURNS))
        | JSON_VALUES,
    )
    | JSON_VALUES,
    st.sampled_from(Format),
)
def test_whatever_a_record_holds_it_is_read_or_refused_by_name(value: Any, format_: Format) -> None:
    # Any other exception ends the test.
    with contextlib.suppress(RecordError):
        record = parse_record(value, format_)
        assert record_from_json(record_to_json(record)) == record
    with contextlib.suppress(UnknownFormatError):
        assert detect([value]) in Format
