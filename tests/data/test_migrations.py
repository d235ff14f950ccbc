"""Homes of before: rows that held JSON read as the messages that they were shown as."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from luthier.data import schema
from luthier.data.datasets import repository as datasets
from luthier.data.record_errors import page_of_errors
from luthier.data.renderings.repository import renderings
from luthier.data.uploads import repository as uploads
from luthier.errors import DataLoss
from luthier.errors.status import failure_to_status, status_to_failure
from luthier.storage.database import Database
from luthier.storage.migrations import upgrade
from luthier.storage.stored import Rows
from luthier.v1.dataset_pb2 import (
    DATASET_FORMAT_ALPACA,
    INVALID_RECORD_POLICY_STRICT,
    SPLIT_TEST,
    SPLIT_TRAIN,
    DatasetVersion,
    RecordError,
)
from luthier.v1.rendering_pb2 import LENGTH_POLICY_DROP, TEMPLATE_ERROR_POLICY_STRICT, Rendering
from luthier.v1.upload_pb2 import Upload
from luthier.work import schema as work_schema

P = "projects/default"
# What was stored for a READY rendering at first, before later versions added fields.
RENDERING = {
    "dataset_version": "projects/default/datasets/d/versions/v",
    "model": "projects/default/models/m",
    "chat_template": "",
    "mask_mode": "DEFAULT",
    "max_tokens": 512,
    "length_policy": "DROP",
    "model_digest": "d",
    "tokenizer_digest": "t",
    "template_date": "2026-11-23",
    "split_statistics": [
        {
            "split": "TRAIN",
            "tokens": {
                "count": 1,
                "sum": 9,
                "minimum": 9,
                "maximum": 9,
                "mean": 9.0,
                "p5": 9,
                "p50": 9,
                "p95": 9,
            },
            "supervised_tokens": {
                "count": 1,
                "sum": 2,
                "minimum": 2,
                "maximum": 2,
                "mean": 2.0,
                "p5": 2,
                "p50": 2,
                "p95": 2,
            },
            "num_dropped": 0,
            "num_truncated": 0,
            "num_unsupervised": 0,
        }
    ],
    "unsupervised_records": [],
    "warnings": [],
    "digest": "r",
    "shards": [],
    "tokenizer_blob": "b",
    "failure": None,
}


VERSION = {
    "sources": [
        {
            "upload": f"{P}/uploads/u",
            "split": "TEST",
            "format": None,
            "filename": "a.jsonl",
            "digest": "ab",
            "size_bytes": 7,
            "detected_format": "ALPACA",
        }
    ],
    "invalid_record_policy": "STRICT",
    "split_settings": {"validation_fraction": 0.25, "test_fraction": 0.5, "seed": -3},
    "statistics": {
        "splits": [{"split": "TRAIN", "num_records": 2, "num_characters": 9, "num_messages": 4}],
        "num_records": 2,
        "num_records_read": 4,
        "num_duplicates": 1,
        "num_invalid": 1,
    },
    "digest": "cd",
    "shards": [
        {"path": "records-00000.parquet", "digest": "ef", "size_bytes": 5, "first_row": 0, "num_rows": 2}
    ],
    "failure": None,
}
FAILURE = {
    "code": "INVALID_ARGUMENT",
    "reason": "INVALID_RECORDS",
    "message": "bad at a.jsonl:1",
    "metadata": {"line": "1"},
    "retry_after_seconds": 1.5,
}
UPLOAD = {"filename": "a.jsonl", "size_bytes": 7, "sha256": "", "persisted_size_bytes": 7, "digest": "ab"}


def insert(path: Path, table: str, name: str, state: str, body: dict[str, Any], labels: str = "{}") -> None:
    row = (name, "/".join(name.split("/")[:-2]), f"uid of {name}", state, labels, 1_000_001, 2_000_002, 3)
    with sqlite3.connect(path) as connection:
        connection.execute(
            f"INSERT INTO {table} VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", (*row, json.dumps(body))
        )
        labelled = [(key, value) for key, value in json.loads(labels).items()]
        for key, value in labelled:
            place = (row[1], key, value, 1_000_001, name)
            connection.execute(f"INSERT INTO {table}_labels VALUES (?, ?, ?, ?, ?)", place)
    connection.close()


@pytest.fixture
async def home(tmp_path: Path) -> AsyncIterator[Database]:
    """A database made before, with a resource of each kind, brought to what the code of today wants."""
    old = tmp_path / "old"
    old.mkdir()
    for path in schema.MIGRATIONS.glob("data_000[123]*.py"):
        shutil.copy(path, old)
    path = tmp_path / "data.db"
    url = f"sqlite+aiosqlite:///{path}"
    upgrade(url, [work_schema.MIGRATIONS, old])
    insert(path, "datasets", f"{P}/datasets/d", "ACTIVE", {"display_name": "Näme"}, '{"team": "a"}')
    insert(path, "dataset_versions", f"{P}/datasets/d/versions/ready", "READY", VERSION)
    failed = {**VERSION, "failure": FAILURE, "shards": [], "digest": ""}
    insert(path, "dataset_versions", f"{P}/datasets/d/versions/failed", "FAILED", failed)
    insert(path, "uploads", f"{P}/uploads/u", "COMPLETE", UPLOAD)
    insert(path, "renderings", f"{P}/renderings/r", "READY", RENDERING)
    with sqlite3.connect(path) as connection:
        error = (f"{P}/datasets/d/versions/failed", 0, "a.jsonl", 1, "p", "MISSING_FIELD", "m", "v")
        connection.execute("INSERT INTO dataset_version_errors VALUES (?, ?, ?, ?, ?, ?, ?, ?)", error)
        refused = (f"{P}/renderings/r", 0, "a.jsonl", 2, "TEMPLATE_INVALID", "no")
        connection.execute("INSERT INTO rendering_errors VALUES (?, ?, ?, ?, ?, ?)", refused)
        # What stands for a resource that is gone goes with it.
        gone = (f"{P}/renderings/gone", 0, "a.jsonl", 2, "TEMPLATE_INVALID", "no")
        connection.execute("INSERT INTO rendering_errors VALUES (?, ?, ?, ?, ?, ?)", gone)
        connection.execute("INSERT INTO staged_uploads VALUES ('uid', 'name', 1)")
    connection.close()
    upgrade(url, [work_schema.MIGRATIONS, schema.MIGRATIONS])
    database = Database(url)
    yield database
    await database.close()


async def test_every_resource_is_what_it_was(home: Database) -> None:
    dataset = await datasets.datasets().read(home, f"{P}/datasets/d")
    assert (dataset.uid, dataset.revision) == (f"uid of {P}/datasets/d", 3)
    message = dataset.message
    assert (message.uid, message.etag, message.display_name) == (dataset.uid, '"3"', "Näme")
    assert dict(message.labels) == {"team": "a"}
    assert (message.create_time.ToMicroseconds(), message.update_time.ToMicroseconds()) == (
        1_000_001,
        2_000_002,
    )
    version = await datasets.versions().read(home, f"{P}/datasets/d/versions/ready")
    assert (version.message.state, version.message.digest) == (DatasetVersion.STATE_READY, "cd")
    assert version.message.invalid_record_policy == INVALID_RECORD_POLICY_STRICT
    settings = version.message.split_settings
    assert (settings.validation_fraction, settings.test_fraction, settings.seed) == (0.25, 0.5, -3)
    (source,) = version.message.sources
    assert (source.split, source.format, source.detected_format) == (SPLIT_TEST, 0, DATASET_FORMAT_ALPACA)
    statistics = version.message.statistics
    assert (statistics.num_records_read, statistics.num_duplicates, statistics.num_invalid) == (4, 1, 1)
    (split,) = statistics.splits
    assert (split.split, split.num_characters, split.num_messages) == (SPLIT_TRAIN, 9, 4)
    assert [(file.path, file.sha256) for file in version.private.source_files] == [("a.jsonl", "ab")]
    (shard,) = version.private.shards
    assert (shard.file.sha256, shard.first_row, shard.num_rows) == ("ef", 0, 2)
    upload = await uploads.uploads().read(home, f"{P}/uploads/u")
    assert (upload.message.state, upload.message.persisted_size_bytes) == (Upload.STATE_COMPLETE, 7)
    assert upload.private.sha256 == "ab"


async def test_what_is_found_by_label_and_state_and_staged_stays(home: Database) -> None:
    for table, equals, found in (
        (datasets.datasets(), {"labels.team": "a"}, [f"{P}/datasets/d"]),
        (datasets.datasets(), {"labels.team": "b"}, []),
        (uploads.uploads(), {"state": "COMPLETE"}, [f"{P}/uploads/u"]),
        (renderings(), {"state": "FAILED"}, []),
    ):
        rows: Rows[Any, Any] = table
        statement = rows.page_statement(parent=P, limit=9, after=None, equals=equals, newest_first=True)
        page = rows.page_of(await home.rows(statement), 9)
        assert [value.name for value in page.values] == found
    async with home.reading() as connection:
        assert await uploads.StagedUploads().is_finishing(connection, "uid")


async def test_a_row_that_cannot_be_read_is_named_and_changes_nothing(tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    for path in schema.MIGRATIONS.glob("data_000[123]*.py"):
        shutil.copy(path, old)
    path = tmp_path / "data.db"
    url = f"sqlite+aiosqlite:///{path}"
    upgrade(url, [work_schema.MIGRATIONS, old])
    insert(path, "renderings", f"{P}/renderings/r", "READY", {**RENDERING, "mask_mode": "NEWER"})

    def dump() -> str:
        with sqlite3.connect(path) as connection:
            lines = "\n".join(connection.iterdump())
        connection.close()
        return lines

    before = dump()
    with pytest.raises(DataLoss, match=r"renderings/r in renderings cannot be read.*NEWER"):
        upgrade(url, [work_schema.MIGRATIONS, schema.MIGRATIONS])
    assert dump() == before


async def test_a_failure_is_told_as_before(home: Database) -> None:
    version = await datasets.versions().read(home, f"{P}/datasets/d/versions/failed")
    assert version.message.state == DatasetVersion.STATE_FAILED
    assert version.message.error == failure_to_status(status_to_failure(version.message.error))
    failure = status_to_failure(version.message.error)
    assert (failure.reason, failure.message, failure.metadata) == (
        "INVALID_RECORDS",
        "bad at a.jsonl:1",
        {"line": "1"},
    )
    assert failure.retry_after_seconds == 1.5


async def test_a_rendering_stored_before_reads_with_defaults(home: Database) -> None:
    rendering = await renderings().read(home, f"{P}/renderings/r")
    message = rendering.message
    assert message.state == Rendering.STATE_READY
    assert (message.split_turns, message.num_errors, list(message.findings)) == (False, 0, [])
    assert message.template_error_policy == TEMPLATE_ERROR_POLICY_STRICT
    assert (message.length_policy, message.mask_mode) == (LENGTH_POLICY_DROP, 0)
    assert (message.split_statistics[0].tokens.sum, message.split_statistics[0].num_records) == (9, 0)
    assert (rendering.private.model_digest, rendering.private.tokenizer_sha256) == ("d", "b")


async def test_errors_go_with_their_resource(home: Database) -> None:
    async with home.reading() as connection:
        of_version = await page_of_errors(connection, f"uid of {P}/datasets/d/versions/failed", 0, 9)
        of_rendering = await page_of_errors(connection, f"uid of {P}/renderings/r", 0, 9)
    bad = RecordError(filename="a.jsonl", line=1, path="p", reason="MISSING_FIELD", message="m", value="v")
    assert of_version == [bad]
    assert of_rendering == [RecordError(filename="a.jsonl", line=2, reason="TEMPLATE_INVALID", message="no")]
