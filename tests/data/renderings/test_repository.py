"""Stored renderings: those of before read as they were, errors come back in order."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import insert

from luthier.data import schema
from luthier.data.renderings.domain import RefusedRecord, RenderingState, TemplateErrorPolicy
from luthier.data.renderings.repository import RenderingErrors, renderings
from luthier.storage.database import Database
from luthier.storage.migrations import upgrade

NAME = "projects/default/renderings/old"
# What data_0001 stored for a READY rendering.
BODY = {
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


@pytest.fixture
async def database(tmp_path: Path) -> Database:
    url = f"sqlite+aiosqlite:///{tmp_path / 'data.db'}"
    upgrade(url, [schema.MIGRATIONS])
    return Database(url)


async def test_a_rendering_stored_before_reads_with_defaults(database: Database) -> None:
    row = {
        "name": NAME,
        "parent": "projects/default",
        "uid": "u",
        "state": "READY",
        "labels": {},
        "create_time_us": 1,
        "update_time_us": 1,
        "revision": 3,
        "body": BODY,
    }
    async with database.transaction() as connection:
        await connection.execute(insert(schema.renderings).values(row))
        rendering = await renderings().get(connection, NAME)
    await database.close()
    assert rendering.state is RenderingState.READY
    assert rendering.create_time == datetime.fromtimestamp(1e-6, UTC)
    assert (rendering.split_turns, rendering.num_errors, rendering.findings) == (False, 0, ())
    assert rendering.template_error_policy is TemplateErrorPolicy.STRICT
    assert (rendering.split_statistics[0].tokens.sum, rendering.split_statistics[0].num_records) == (9, 0)


async def test_errors_come_back_in_order_page_by_page(database: Database) -> None:
    errors = [
        RefusedRecord(filename="a.jsonl", line=line, reason="TEMPLATE_INVALID", message="no")
        for line in (3, 1, 2)
    ]
    stored = RenderingErrors()
    async with database.transaction() as connection:
        await stored.add(connection, NAME, errors)
        await stored.add(connection, f"{NAME}er", ())
        assert await stored.page(connection, NAME, 0, 2) == errors[:2]
        assert await stored.page(connection, NAME, 2, 2) == errors[2:]
        assert await stored.page(connection, f"{NAME}er", 0, 2) == []
    await database.close()
