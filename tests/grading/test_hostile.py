"""Graders that nobody would write: refused by words, or graded with to a score or an error; never anything else."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.grading.grader_messages import json_match, multi, number_match, regex, similarity, string_check

from luthier.errors import Reason
from luthier.grading.checks import grader_violations
from luthier.grading.graders import ReadGrader
from luthier.grading.outcomes import Sample
from luthier.v1.grader_pb2 import Grader, ScoreRange

TEXTS = st.sampled_from(
    [
        "",
        "{{sample.output_text}}",
        "{{sample.output_json.a}}",
        "{{item.a}} and {{item.b[0].c}}",
        "{{item}}",
        "{{",
        "{{item.a",
        "{{item.a|b}}",
        "\x00",
        "7",
        '{"a": 1}',
        "(a+)+$",
        "(",
        "a + b",
        "1/0",
        "\ufffe\u202e",
    ]
) | st.text(max_size=20)
LEAVES = st.one_of(
    st.builds(string_check, st.sampled_from(["EQ", "NE", "LIKE", "ILIKE", "UNSPECIFIED"]), TEXTS, TEXTS),
    st.builds(similarity, st.sampled_from(["BLEU", "GLEU", "ROUGE_2", "ROUGE_L", "FUZZY_MATCH"]), TEXTS),
    st.builds(lambda pattern, text: regex(pattern, full_match=len(text) > 3), TEXTS, TEXTS),
    st.builds(
        lambda text, fields, whole: json_match(input=text, fields=fields, whole=whole),
        TEXTS,
        st.lists(TEXTS, max_size=3),
        st.booleans(),
    ),
    st.builds(
        lambda text, pattern, tolerance: number_match(
            reference=text, pattern=pattern, absolute_tolerance=tolerance
        ),
        TEXTS,
        TEXTS,
        st.floats(),
    ),
    st.just(Grader()),
)


def combined(left: Grader, right: Grader, formula: str, bounds: tuple[float, float]) -> Grader:
    grader = multi(formula, a=left, b=right)
    grader.multi.range.CopyFrom(ScoreRange(min=bounds[0], max=bounds[1]))
    return grader


GRADERS = st.recursive(
    LEAVES,
    lambda inner: st.builds(
        combined,
        inner,
        inner,
        st.sampled_from(["a", "a + b", "a / b", "max(a, b) * 3 - 1", "b ^ a", "c", "a b"]) | TEXTS,
        st.tuples(st.floats(), st.floats()) | st.just((-1.0, 2.0)),
    ),
    max_leaves=5,
)
ITEMS = (
    st.sampled_from(["", "{}", '{"a": "x", "b": [{"c": 3}]}', '{"a": null}', "[", '{"a": "\\ud800"}', "NaN"])
    | TEXTS
)


@settings(deadline=None, max_examples=400)
@given(GRADERS, ITEMS, TEXTS)
def test_any_grader_is_refused_or_gives_a_score_or_an_error(grader: Grader, item: str, text: str) -> None:
    violations = list(grader_violations(grader, "grader"))
    assert all(one.field.startswith("grader") and one.description for one in violations)
    if violations:
        return
    sample = Sample(item_json=item, output_text=text)
    grade = ReadGrader(grader).grade(sample)
    again: Any = ReadGrader(Grader.FromString(grader.SerializeToString())).grade(sample)
    assert (grade.score, dict(grade.parts)) == (again.score, dict(again.parts))
    if grade.error is not None:
        assert grade.score is None
        assert grade.error.reason in Reason.__members__.values()
        assert grade.error.message.startswith("grader ")
        return
    assert grade.score is not None
    least, most = (grader.multi.range.min, grader.multi.range.max) if grader.HasField("multi") else (0.0, 1.0)
    assert least <= grade.score <= most
