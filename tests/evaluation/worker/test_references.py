"""What is scored: checked before any model is loaded, and bounded however many fields the references have."""

from __future__ import annotations

import json

import pytest

from luthier.errors import InvalidArgument
from luthier.evaluation.worker.questions import Question
from luthier.evaluation.worker.references import FIELD_SCORE, MAX_FIELDS, grading_of
from luthier.text.records import CompletionRecord
from luthier.v1 import evaluation_pb2
from luthier.worker.v1.task_pb2 import AnsweredRecord

FIELDS = evaluation_pb2.EVALUATION_METRIC_FIELD_MATCH


def questions(*references: object) -> list[Question]:
    return [
        Question(
            row=row,
            record_id=f"{row:064x}",
            record=CompletionRecord(prompt="q", completion=json.dumps(reference)),
            filename="a.jsonl",
            line=row + 1,
        )
        for row, reference in enumerate(references)
    ]


def evaluation(num_arms: int = 2) -> evaluation_pb2.Evaluation:
    arms = [evaluation_pb2.EvaluationArm(arm_id=f"a{number}") for number in range(num_arms)]
    return evaluation_pb2.Evaluation(metrics=[FIELDS], arms=arms)


def test_the_fields_that_most_records_have_are_scored_by_themselves() -> None:
    rare = [{"common": 1, **{f"{row}-{number}": 1 for number in range(60)}} for row in range(3)]
    grading = grading_of(evaluation(), questions(*rare))
    assert len(grading.fields) == MAX_FIELDS
    assert f"{FIELD_SCORE}common" in grading.fields
    assert "181 fields: the 100 that most" in grading.warnings[0]
    scores = grading.scores(AnsweredRecord(text=json.dumps(rare[2])), questions(*rare)[2])
    assert scores["field_match.fields"] == scores["field_match.record"] == 1.0
    assert len(scores) < 60


def test_few_fields_are_all_scored_and_nothing_is_said() -> None:
    grading = grading_of(evaluation(), questions({"a": 1}, {"b": 2}))
    assert grading.fields == {f"{FIELD_SCORE}a", f"{FIELD_SCORE}b"}
    assert grading.warnings == ()


def test_long_names_and_many_arms_leave_room_in_a_message() -> None:
    fields = {f"{number}" + "x" * 101: number for number in range(200)}
    assert grading_of(evaluation(16), questions(fields)).fields == frozenset()
    short = {f"{number}": number for number in range(200)}
    for num_arms, most in ((1, 100), (11, 100), (16, 50)):
        kept = grading_of(evaluation(num_arms), questions(short)).fields
        assert len(kept) == most
        assert len(kept) * num_arms * (num_arms - 1) // 2 <= 6000


def test_a_reference_that_does_not_suit_is_named_by_file_and_line() -> None:
    with pytest.raises(InvalidArgument, match=r"^a\.jsonl:2: the reference must be a JSON object") as told:
        grading_of(evaluation(), questions({"a": 1}, ["b"]))
    assert told.value.metadata == {"filename": "a.jsonl", "line": "2"}
