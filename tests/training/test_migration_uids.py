"""Homes of before: their jobs and models are found by what they were made from, and by labels, as new ones are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from tests.training.test_migration import FILE, FIRST_BODY, HUB, JOB, OldHome, add_job

from luthier.storage.database import Database
from luthier.training.jobs import repository as jobs
from luthier.training.models import repository as models

BASE = FIRST_BODY["base_model"]
TUNED = "projects/p/models/m"


@pytest.fixture
def home(tmp_path: Path) -> OldHome:
    made = OldHome(tmp_path)
    base = {"kind": "BASE", "source": HUB}
    made.add("models", BASE, "READY", base, kind="BASE", base_model="", fine_tuning_job="")
    add_job(made, JOB, "SUCCEEDED", FIRST_BODY)
    body = {"kind": "ADAPTER", "base_model": BASE, "fine_tuning_job": JOB, "step": 9, "files": [FILE]}
    made.add("models", TUNED, "READY", body, kind="ADAPTER", base_model=BASE, fine_tuning_job=JOB)
    return made


async def rows(database: Database, statement: str) -> list[dict[str, Any]]:
    return [dict(row) for row in await database.rows(text(statement))]


async def test_what_a_row_was_made_from_has_its_uid_or_its_digest_beside_its_name(home: OldHome) -> None:
    database = home.migrated()
    of_models = await rows(
        database, "SELECT name, base_model_uid, fine_tuning_job_uid FROM models ORDER BY name DESC"
    )
    of_jobs = await rows(database, "SELECT base_model_uid, rendering_uid FROM fine_tuning_jobs")
    await database.close()
    assert of_models == [
        {"name": TUNED, "base_model_uid": f"uid of {BASE}", "fine_tuning_job_uid": f"uid of {JOB}"},
        {"name": BASE, "base_model_uid": "", "fine_tuning_job_uid": ""},
    ]
    # Which rendering it was only the Data service knows: what it rendered tells it from others of its name.
    digest = FIRST_BODY["rendering_digest"]
    assert of_jobs == [{"base_model_uid": f"uid of {BASE}", "rendering_uid": digest}]


async def test_what_is_written_again_keeps_what_the_migration_wrote(home: OldHome) -> None:
    database = home.migrated()
    before = await rows(database, "SELECT base_model_uid, rendering_uid FROM fine_tuning_jobs")
    async with database.transaction() as connection:
        job = await jobs.jobs().get(connection, JOB)
        await jobs.jobs().update(connection, job, job.copy())
        model = await models.models().get(connection, TUNED)
        await models.models().update(connection, model, model.copy())
    assert await rows(database, "SELECT base_model_uid, rendering_uid FROM fine_tuning_jobs") == before
    told = await rows(database, f"SELECT fine_tuning_job_uid AS uid FROM models WHERE name = '{TUNED}'")
    assert told == [{"uid": f"uid of {JOB}"}]
    await database.close()


@pytest.mark.parametrize("family", ["models", "fine_tuning_jobs"])
async def test_labels_have_the_uid_of_their_resource(home: OldHome, family: str) -> None:
    database = home.migrated()
    found = await rows(database, f"SELECT uid, name, key, value FROM {family}_labels")
    await database.close()
    names = {"models": {BASE, TUNED}, "fine_tuning_jobs": {JOB}}[family]
    assert {one["name"] for one in found} == names
    assert all(one["uid"] == f"uid of {one['name']}" for one in found)
    assert {(one["key"], one["value"]) for one in found} == {("team", "red")}
