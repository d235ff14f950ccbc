"""Homes of before: evaluations that were rows of JSON read as the messages that they were shown as."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.evaluation.former_rows import FAILURE, LATEST, OLDEST, PROGRESS, P
from tests.storage.declared import declared

from luthier.errors.status import status_to_failure
from luthier.evaluation import schema
from luthier.evaluation.evaluations.repository import AnswerFiles, Predictions, evaluations
from luthier.storage.database import Database
from luthier.storage.migrations import differences, upgrade
from luthier.v1 import evaluation_pb2
from luthier.v1.dataset_pb2 import SPLIT_TEST, SPLIT_VALIDATION
from luthier.v1.evaluation_pb2 import Evaluation, EvaluationArm, ScoreEstimate
from luthier.v1.event_pb2 import Progress
from luthier.work import schema as work_schema
from luthier.worker.v1.task_pb2 import Asking, BlobFile, PrefixTokens

MADE_US, CHANGED_US = 1_000_001, 2_000_002


def named(evaluation_id: str) -> str:
    return f"{P}/evaluations/{evaluation_id}"


def insert(connection: sqlite3.Connection, evaluation_id: str, state: str, body: dict[str, Any]) -> None:
    name = named(evaluation_id)
    row = (name, P, f"uid of {evaluation_id}", state, '{"team": "a"}', MADE_US, CHANGED_US, 3)
    connection.execute("INSERT INTO evaluations VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", (*row, json.dumps(body)))
    label = (P, "team", "a", MADE_US, name)
    connection.execute("INSERT INTO evaluations_labels VALUES (?, ?, ?, ?, ?)", label)


@pytest.fixture
async def home(tmp_path: Path) -> AsyncIterator[Database]:
    """A database made before, brought to what the code of today wants."""
    old = tmp_path / "old"
    old.mkdir()
    for path in schema.MIGRATIONS.glob("evaluation_000[123]*.py"):
        shutil.copy(path, old)
    path = tmp_path / "evaluation.db"
    url = f"sqlite+aiosqlite:///{path}"
    upgrade(url, [work_schema.MIGRATIONS, old])
    with sqlite3.connect(path) as connection:
        insert(connection, "oldest", "SUCCEEDED", OLDEST)
        insert(connection, "latest", "SUCCEEDED", LATEST)
        unended = {**LATEST, "end_time": None, "predictions": None}
        insert(connection, "running", "RUNNING", {**unended, "progress": PROGRESS})
        insert(connection, "failed", "FAILED", {**LATEST, "failure": FAILURE})
        least = {"dataset_version": "v", "arms": [{"arm_id": "a", "model": "m"}]}
        insert(connection, "least", "QUEUED", least)
        for owner in ("oldest", "gone"):
            for row in range(2):
                prediction = (named(owner), row, b"%d" % row)
                connection.execute("INSERT INTO predictions VALUES (?, ?, ?)", prediction)
        for owner in ("running", "gone"):
            file = (named(owner), 64, 0, "a", "f" * 64, 7)
            connection.execute("INSERT INTO answer_files VALUES (?, ?, ?, ?, ?, ?)", file)
    connection.close()
    upgrade(url, [work_schema.MIGRATIONS, schema.MIGRATIONS])
    assert differences(url, declared(work_schema.metadata, schema.metadata)) == []
    database = Database(url)
    yield database
    await database.close()


async def test_an_evaluation_of_the_version_before_is_what_it_was(home: Database) -> None:
    stored = await evaluations().read(home, named("latest"))
    message = stored.message
    assert (message.uid, message.etag, message.state) == ("uid of latest", '"3"', Evaluation.STATE_SUCCEEDED)
    assert dict(message.labels) == {"team": "a"}
    assert message.create_time.ToMicroseconds() == MADE_US
    assert message.update_time.ToMicroseconds() == CHANGED_US
    assert message.end_time.ToJsonString() == "2026-01-02T03:04:05Z"
    assert list(message.arms) == [
        EvaluationArm(arm_id="own", model=f"{P}/models/base", num_shots=3, chat_template="mine"),
        EvaluationArm(arm_id="tuned", model=f"{P}/models/tuned", template=evaluation_pb2.ARM_TEMPLATE_TAUGHT),
    ]
    assert (message.display_name, message.split, message.max_records) == ("Näme", SPLIT_VALIDATION, 9)
    assert (message.seed, message.max_new_tokens, message.num_records) == (-4, 33, 9)
    assert list(message.metrics) == [
        evaluation_pb2.EVALUATION_METRIC_FIELD_MATCH,
        evaluation_pb2.EVALUATION_METRIC_PERPLEXITY,
    ]
    assert message.dataset_digest == "dv"
    assert dict(message.model_digests) == {f"{P}/models/base": "db", f"{P}/models/tuned": "dt"}
    assert list(message.warnings) == ["arm own could not answer 1 of 9 records"]
    assert not message.HasField("progress")
    assert not message.HasField("error")


async def test_results_are_what_they_were(home: Database) -> None:
    message = (await evaluations().read(home, named("latest"))).message
    (result,) = message.arm_results
    match, perplexity = result.scores
    assert match == ScoreEstimate(
        score="exact_match",
        value=0.5,
        lower=0.25,
        upper=0.75,
        count=9,
        kind=evaluation_pb2.SCORE_KIND_BINARY,
        direction=evaluation_pb2.SCORE_DIRECTION_HIGHER_IS_BETTER,
        text_form=evaluation_pb2.TEXT_FORM_NFC,
        whole_answer=True,
    )
    assert (perplexity.kind, perplexity.direction, perplexity.text_form) == (
        evaluation_pb2.SCORE_KIND_REAL,
        evaluation_pb2.SCORE_DIRECTION_LOWER_IS_BETTER,
        evaluation_pb2.TEXT_FORM_UNSPECIFIED,
    )
    del result.scores[:]
    assert result == evaluation_pb2.ArmResult(
        arm_id="own",
        num_generated_tokens=100,
        num_prompt_tokens=200,
        duration_seconds=1.5,
        num_cut=2,
        template_source=evaluation_pb2.TEMPLATE_SOURCE_ARM,
        template_digest="e",
        template_date="2026-02-02",
        num_errors=1,
    )
    (comparison,) = message.comparisons
    assert comparison == evaluation_pb2.Comparison(
        candidate_arm_id="tuned",
        baseline_arm_id="own",
        score="exact_match",
        difference=0.25,
        lower=0.125,
        upper=0.5,
        p_value=0.0,
        count=9,
        verdict=evaluation_pb2.VERDICT_BETTER,
        kind=evaluation_pb2.SCORE_KIND_BINARY,
        direction=evaluation_pb2.SCORE_DIRECTION_HIGHER_IS_BETTER,
        whole_answer=True,
    )


async def test_what_only_the_service_knows_is_what_it_was(home: Database) -> None:
    private = (await evaluations().read(home, named("latest"))).private
    assert private.base_model == f"{P}/models/base"
    assert list(private.askings) == [
        Asking(
            template_source=evaluation_pb2.TEMPLATE_SOURCE_ARM,
            chat_template="mine",
            template_date="2026-02-02",
            eos_token_ids=[9, 11],
            old_prefix=True,
        ),
        Asking(
            template_source=evaluation_pb2.TEMPLATE_SOURCE_TAUGHT,
            chat_template="t",
            template_date="2026-01-01",
            prefix=PrefixTokens(),
            stop_token_ids=[5],
        ),
    ], "in the order of the arms"
    file = private.predictions
    assert (file.sha256, file.size_bytes, file.num_rows) == ("f" * 64, 77, 9)


async def test_a_result_from_before_kinds_were_kept_says_what_its_score_is(home: Database) -> None:
    message = (await evaluations().read(home, named("oldest"))).message
    (result,) = message.arm_results
    assert (result.num_cut, result.num_errors, result.template_source) == (3, 0, 0)
    kinds = {
        score.score: (
            evaluation_pb2.ScoreKind.Name(score.kind).removeprefix("SCORE_KIND_"),
            evaluation_pb2.ScoreDirection.Name(score.direction).removeprefix("SCORE_DIRECTION_"),
        )
        for score in result.scores
    }
    assert kinds == {
        "exact_match": ("BINARY", "HIGHER_IS_BETTER"),
        "field_match.fields": ("FRACTION", "HIGHER_IS_BETTER"),
        "field_match.record": ("BINARY", "HIGHER_IS_BETTER"),
        "field_match.parsed": ("BINARY", "HIGHER_IS_BETTER"),
        "field_match.field.colour": ("BINARY", "HIGHER_IS_BETTER"),
        "perplexity": ("REAL", "LOWER_IS_BETTER"),
        "bleu": ("UNSPECIFIED", "UNSPECIFIED"),
    }
    assert {score.text_form for score in result.scores} == {evaluation_pb2.TEXT_FORM_UNSPECIFIED}
    (comparison,) = message.comparisons
    assert comparison.kind == evaluation_pb2.SCORE_KIND_REAL
    assert comparison.direction == evaluation_pb2.SCORE_DIRECTION_LOWER_IS_BETTER
    assert (comparison.HasField("p_value"), comparison.verdict) == (False, evaluation_pb2.VERDICT_WORSE)
    assert message.end_time.ToJsonString() == "2026-01-02T03:04:05.678901Z"


async def test_what_belongs_to_an_evaluation_is_found_by_its_uid_and_the_rest_is_gone(home: Database) -> None:
    oldest = await evaluations().read(home, named("oldest"))
    assert (list(oldest.private.askings), oldest.private.HasField("predictions")) == ([], False)
    async with home.reading() as connection:
        assert await Predictions().read(connection, oldest.uid, 0, 9) == [b"0", b"1"]
        assert await AnswerFiles().read(connection, "uid of running") == [
            BlobFile(path="a", sha256="f" * 64, size_bytes=7)
        ]
        for table in (schema.predictions, schema.answer_files):
            owners = set((await connection.execute(table.select())).scalars())
            assert owners == {"uid of oldest" if table is schema.predictions else "uid of running"}


async def test_a_running_evaluation_goes_on(home: Database) -> None:
    stored = await evaluations().read(home, named("running"))
    assert stored.message.progress == Progress(**PROGRESS)  # type: ignore[arg-type]
    assert not stored.message.HasField("end_time")
    async with home.transaction() as connection:
        changed = stored.copy()
        changed.progress.completed = 9
        reported = await evaluations().report(connection, stored, changed)
    assert (reported.revision, reported.message.progress.completed) == (3, 9)


async def test_a_failure_is_told_as_before(home: Database) -> None:
    message = (await evaluations().read(home, named("failed"))).message
    failure = status_to_failure(message.error)
    assert (failure.code, failure.reason, failure.message) == (
        "INVALID_ARGUMENT",
        "INVALID_RECORDS",
        "row 3: no JSON",
    )
    assert (failure.metadata, failure.retry_after_seconds) == ({"row": "3"}, None)


async def test_what_a_row_lacks_has_the_default_of_its_time(home: Database) -> None:
    stored = await evaluations().read(home, named("least"))
    message = stored.message
    assert (message.split, message.max_new_tokens, message.state) == (
        SPLIT_TEST,
        256,
        Evaluation.STATE_QUEUED,
    )
    assert list(message.metrics) == [evaluation_pb2.EVALUATION_METRIC_EXACT_MATCH]
    assert list(message.arms) == [EvaluationArm(arm_id="a", model="m")]
    assert not stored.private.ListFields()
