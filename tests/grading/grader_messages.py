"""Graders as tests write them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from luthier.grading.graders import ReadGrader
from luthier.grading.outcomes import Grade, GradingError, Sample
from luthier.v1.grader_pb2 import (
    Grader,
    JsonMatchGrader,
    MultiGrader,
    NumberMatchGrader,
    RegexGrader,
    RemoteGrader,
    RewardModelGrader,
    StringCheckGrader,
    TextSimilarityGrader,
)

ANSWER = "{{sample.output_text}}"


def string_check(operation: str = "EQ", reference: str = "{{item.answer}}", text: str = ANSWER) -> Grader:
    number = StringCheckGrader.Operation.Value(f"OPERATION_{operation}")
    return Grader(string_check=StringCheckGrader(input=text, reference=reference, operation=number))


def similarity(measure: str, reference: str = "{{item.answer}}") -> Grader:
    number = TextSimilarityGrader.Similarity.Value(f"SIMILARITY_{measure}")
    grader = TextSimilarityGrader(input=ANSWER, reference=reference, evaluation_metric=number)
    return Grader(text_similarity=grader)


def multi(calculate_output: str, **graders: Grader) -> Grader:
    return Grader(multi=MultiGrader(graders=graders, calculate_output=calculate_output))


def json_match(**fields: Any) -> Grader:
    return Grader(json_match=JsonMatchGrader(**{"input": ANSWER, "reference": "{{item.answer}}", **fields}))


def number_match(**fields: Any) -> Grader:
    return Grader(
        number_match=NumberMatchGrader(**{"input": ANSWER, "reference": "{{item.answer}}", **fields})
    )


def regex(pattern: str, **fields: Any) -> Grader:
    return Grader(regex=RegexGrader(input=ANSWER, pattern=pattern, **fields))


def remote(address: str = "127.0.0.1:1", **fields: Any) -> Grader:
    return Grader(remote=RemoteGrader(address=address, **fields))


def reward_model(model: str = "projects/default/models/judge") -> Grader:
    return Grader(reward_model=RewardModelGrader(model=model))


def graded(
    grader: Grader,
    output_text: str,
    item_json: str = "{}",
    remote_scores: Mapping[str, float | GradingError] = MappingProxyType({}),
    values: Mapping[str, float | GradingError] = MappingProxyType({}),
) -> Grade:
    sample = Sample(item_json=item_json, output_text=output_text, remote=remote_scores, values=values)
    return ReadGrader(grader).grade(sample)
