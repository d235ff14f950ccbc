from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.grading.metrics.field_match import field_match
from luthier.grading.metrics.text_form import in_text_form

REFERENCE = '{"company": "Hexworth", "revenue": 12.5, "guidance": null}'
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(max_size=8), JSON_VALUES, min_size=1, max_size=5)


def test_field_match_scores_fields_and_the_whole_record() -> None:
    scores = field_match('{"company": "Hexworth", "revenue": 13, "guidance": null}', REFERENCE)
    assert scores == {
        "field_match.field.company": 1.0,
        "field_match.field.revenue": 0.0,
        "field_match.field.guidance": 1.0,
        "field_match.fields": pytest.approx(2 / 3),
        "field_match.record": 0.0,
        "field_match.parsed": 1.0,
    }


@pytest.mark.parametrize(
    ("prediction", "reference", "right"),
    [
        ("12.50", "12.5", True),
        ("3", "3.0", True),
        ("1.25e1", "12.5", True),
        ("0.30000000000000004", "0.3", True),
        ("-0.0", "0", True),
        ("12.51", "12.5", False),
        ("12500000001", "12500000000", False),
        ('"12.5"', "12.5", False),
        ("true", "1", False),
        ("1", "true", False),
        ("false", "null", False),
        ("null", "null", True),
        ("0", "null", False),
        ('""', "null", False),
        ('"  raised "', '"raised"', True),
        ('"Raised"', '"raised"', False),
        ('[1, " a"]', '[1.0, "a"]', True),
        ("[1]", "[1, 2]", False),
        ('{"a": 1}', '{"a": 1.0}', True),
        ('{"a": 1, "b": null}', '{"a": 1}', False),
        ('"Zu\u0308rich"', '"Z\u00fcrich"', True),
        (r'"Zu\u0308rich"', '"Z\u00fcrich"', True),
        ('["10\u00b2"]', '["102"]', False),
        ('{"Gro\u0308sse": 1}', '{"Gr\u00f6sse": 1}', True),
        ("NaN", "1", False),
        ("Infinity", "1", False),
        pytest.param("9" * 400, "12.5", False, id="integer beyond float"),
        pytest.param("9" * 400, "9" * 400, True, id="equal integers beyond float"),
    ],
)
def test_field_match_compares_values_by_their_meaning(prediction: str, reference: str, right: bool) -> None:
    scores = field_match(f'{{"x": {prediction}}}', f'{{"x": {reference}}}')
    assert scores["field_match.record"] == scores["field_match.field.x"] == float(right)


def test_field_match_takes_a_missing_field_for_wrong_even_where_null_is_right() -> None:
    scores = field_match('{"company": "Hexworth", "revenue": 12.5}', REFERENCE)
    assert scores["field_match.field.guidance"] == 0.0
    assert scores["field_match.record"] == 0.0


def test_field_match_wants_no_other_field_in_a_whole_record() -> None:
    prediction = '{"company": "Hexworth", "revenue": 12.5, "guidance": null, "eps": null}'
    scores = field_match(prediction, REFERENCE)
    assert scores["field_match.fields"] == 1.0
    assert scores["field_match.record"] == 0.0


@pytest.mark.parametrize(
    "prediction",
    [
        "",
        "Hexworth",
        '["Hexworth"]',
        "null",
        REFERENCE[:-1],
        f"Here it is: {REFERENCE}",
        pytest.param("[" * 100_000, id="nested beyond the recursion limit"),
        pytest.param('{"revenue": ' + "9" * 5000 + "}", id="more digits than Python reads"),
    ],
)
def test_field_match_counts_what_is_no_object_as_a_miss(prediction: str) -> None:
    scores = field_match(prediction, REFERENCE)
    assert set(scores) == set(field_match(REFERENCE, REFERENCE))
    assert set(scores.values()) == {0.0}


@pytest.mark.parametrize("reference", ["", "12.5", "[]", "{}", '{"a":'])
def test_field_match_refuses_a_reference_without_fields(reference: str) -> None:
    with pytest.raises(ValueError, match="the reference must be a JSON object with a field"):
        field_match("{}", reference)


@given(record=OBJECTS, data=st.data())
def test_field_match_knows_a_record_again_in_any_order_and_layout(
    record: dict[str, object], data: st.DataObject
) -> None:
    shuffled = dict(data.draw(st.permutations(list(record.items()))))
    prediction = json.dumps(shuffled, indent=2, ensure_ascii=data.draw(st.booleans()))
    assert set(field_match(prediction, json.dumps(record)).values()) == {1.0}


@given(prediction=OBJECTS, reference=OBJECTS)
def test_field_match_gives_the_share_of_right_fields(
    prediction: dict[str, object], reference: dict[str, object]
) -> None:
    scores = field_match(json.dumps(prediction), json.dumps(reference))
    by_field = [scores[f"field_match.field.{name}"] for name in {in_text_form(name) for name in reference}]
    assert scores["field_match.fields"] == pytest.approx(sum(by_field) / len(by_field))
    assert scores["field_match.record"] <= scores["field_match.fields"]


def test_names_of_fields_are_compared_in_one_form() -> None:
    scores = field_match('{"Gro\u0308sse": 1}', '{"Gr\u00f6sse": 1}')
    assert (scores["field_match.field.Gr\u00f6sse"], scores["field_match.record"]) == (1.0, 1.0)


@pytest.mark.parametrize("depth", [100, 101, 900, 100_000])
def test_json_nested_too_deep_is_no_object_and_no_failure(depth: int) -> None:
    nested = '{"a":' * depth + "1" + "}" * depth
    if depth == 100:
        assert field_match(nested, nested)["field_match.record"] == 1.0
        return
    assert field_match(nested, '{"a": 1}')["field_match.parsed"] == 0.0
    with pytest.raises(ValueError, match="must be a JSON object"):
        field_match("{}", nested)
