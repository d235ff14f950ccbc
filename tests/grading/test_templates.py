"""Templates: what is put in, what is missing, and odd paths."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.errors import Reason
from luthier.grading.outcomes import GradingError, Sample
from luthier.grading.templates import MAX_TEXT_CHARACTERS, parsed

ITEM = {
    "x": "text",
    "n": 12345678901234567890,
    "f": 0.1,
    "yes": True,
    "none": None,
    "a": {"b": [{"c": "deep"}, "last"], "größe-1": 3, "0": "zero"},
    "empty": "",
}
SAMPLE = Sample(item_json=json.dumps(ITEM), output_text='{"v": [1, {"w": "Ω"}]}')


def filled(text: str, sample: Sample = SAMPLE) -> str:
    return parsed(text, "input").filled(sample)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("{{item.x}}", "text"),
        ("{{ item.x }}", "text"),
        ("<{{item.x}}|{{item.empty}}>", "<text|>"),
        ("{{item.n}} {{item.f}} {{item.yes}} {{item.none}}", "12345678901234567890 0.1 true null"),
        ("{{item.a.b[0].c}}", "deep"),
        ("{{item.a.b[-1]}}", "last"),
        ("{{item.a.b}}", '[{"c":"deep"},"last"]'),
        ("{{item.a.größe-1}}", "3"),
        ("{{item.a.0}}", "zero"),
        ("{{sample.output_text}}", '{"v": [1, {"w": "Ω"}]}'),
        ("{{sample.output_json.v[1].w}}", "Ω"),
        ("{{sample.output_json}}", '{"v":[1,{"w":"Ω"}]}'),
        ("{ {item.x} } }} {", "{ {item.x} } }} {"),
        ("", ""),
    ],
)
def test_filled_puts_in_what_is_named(text: str, wanted: str) -> None:
    assert filled(text) == wanted


def test_filled_does_not_read_templates_in_values() -> None:
    sample = Sample(item_json='{"x": "{{item.secret}}", "secret": "s"}', output_text="{{item.secret}}")
    assert filled("{{item.x}}{{sample.output_text}}", sample) == "{{item.secret}}{{item.secret}}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{{item.y}}", r"input names {{item.y}}, but there is no field 'y' in item, which has 'x', 'n'"),
        ("{{item.x.y}}", r"no field 'y' in item.x, which is 'text'"),
        ("{{item.a.b[2]}}", r"no \[2\] in item.a.b, which is a list of 2"),
        ("{{item.a.b[-3]}}", r"no \[-3\] in item.a.b"),
        ("{{item.a[0]}}", r"no \[0\] in item.a, which has 'b'"),
        ("{{item.a.b.c}}", r"no field 'c' in item.a.b, which is a list of 2"),
        ("{{item.__class__}}", "no field '__class__' in item"),
        ("{{item.a.b.append}}", "no field 'append'"),
        ("{{sample.output_json.q}}", r"no field 'q' in sample.output_json, which has 'v'"),
    ],
)
def test_filled_names_what_is_missing(text: str, said: str) -> None:
    with pytest.raises(GradingError, match=said) as caught:
        filled(text)
    assert caught.value.reason == Reason.TEMPLATE_FIELD_MISSING


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{{item.x", "{{ at character 0 must be closed"),
        ("ab{{", "{{ at character 2 must be closed"),
        ("{{}}", "must name item or sample"),
        ("{{x}}", "must name item or sample"),
        ("{{items.x}}", "must name item or sample"),
        ("{{item.}}", "must name item or sample"),
        ("{{item..x}}", "must name item or sample"),
        ("{{item.x y}}", "must name item or sample"),
        ("{{item[x]}}", "must name item or sample"),
        ("{{item.a[1e3]}}", "must name item or sample"),
        ("{{item['x']}}", "must name item or sample"),
        ("{{item.x|upper}}{{", "{{ at character 16"),
        ("{{ {{item.x}} }}", "must name item or sample"),
        ("{{item.x\x1b}}", "must name item or sample"),
        ("{{sample}}", "sample has output_text"),
        ("{{sample.choices}}", "sample has output_text"),
        ("{{sample.output_text.x}}", "sample has output_text, which is text"),
        ("{{sample[0]}}", "sample has output_text"),
        ("{{item.x}}" * 65, "at most 64"),
        ("{{item" + ".x" * 17 + "}}", "at most 16 steps"),
    ],
)
def test_parsed_refuses_odd_paths(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("{", r"\{")):
        parsed(text, "input")


@pytest.mark.parametrize(
    ("sample", "said"),
    [
        (Sample(item_json="[1]", output_text=""), "must be a JSON object"),
        (Sample(item_json="{", output_text=""), "must be JSON"),
        (Sample(item_json='{"x": NaN}', output_text=""), "NaN is no number of JSON"),
        (Sample(item_json='{"x": ' + "9" * 5000 + "}", output_text=""), "must be JSON"),
        (Sample(item_json='{"x": ' + "[" * 100_000 + "}", output_text=""), "nested too deep"),
        (Sample(item_json='{"x": "\\ud800"}', output_text=""), "half a character"),
        (Sample(item_json='{"x": "' + "y" * (1 << 18) + '"}', output_text=""), "at most 262144 bytes"),
        (Sample(item_json='{"x": "' + "y" * 65_537 + '"}', output_text=""), "at most 65536 characters"),
    ],
)
def test_filled_refuses_records_that_are_none(sample: Sample, said: str) -> None:
    with pytest.raises(GradingError, match=said) as caught:
        filled("{{item.x}}", sample)
    assert caught.value.reason == Reason.GRADER_INPUT_INVALID


def test_filled_names_an_answer_that_is_no_json() -> None:
    with pytest.raises(GradingError, match="needs an answer that is JSON") as caught:
        filled("{{sample.output_json.x}}", Sample(item_json="", output_text="no"))
    assert caught.value.reason == Reason.GRADER_INPUT_INVALID


def test_filled_adds_up_what_many_places_put_in() -> None:
    sample = Sample(item_json="", output_text="x" * (MAX_TEXT_CHARACTERS // 2))
    assert len(filled("{{sample.output_text}}" * 2, sample)) == MAX_TEXT_CHARACTERS
    with pytest.raises(GradingError, match="at most 65536 characters, it has more"):
        filled("{{sample.output_text}}{{sample.output_text}}.", sample)


@given(st.text(alphabet="{}item.sample[0]-x \x00\n", max_size=40))
def test_parsed_reads_or_refuses_and_never_fails_otherwise(text: str) -> None:
    try:
        template = parsed(text, "input")
    except ValueError:
        return
    try:
        template.filled(SAMPLE)
    except GradingError as error:
        assert error.reason in (Reason.TEMPLATE_FIELD_MISSING, Reason.GRADER_INPUT_INVALID)  # noqa: PT017


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda one: st.lists(one) | st.dictionaries(st.text(), one),
        max_leaves=10,
    )
)
def test_filled_writes_a_value_that_reads_back(value: object) -> None:
    sample = Sample(item_json=json.dumps({"v": value}), output_text="")
    try:
        text = filled("{{item.v}}", sample)
    except GradingError as error:
        assert "half a character" in error.message  # noqa: PT017
        return
    assert text == value if isinstance(value, str) else json.loads(text) == value
