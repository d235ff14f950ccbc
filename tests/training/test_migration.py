"""Rows of JSON, as former versions wrote them, become messages and lose nothing."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from tests.stored_pages import page_of

from luthier.errors.status import status_to_failure
from luthier.storage.database import Database
from luthier.storage.migrations import upgrade
from luthier.training import schema
from luthier.training.jobs import repository as jobs
from luthier.training.models import repository as models
from luthier.v1.fine_tuning_job_pb2 import (
    DETERMINISM_BITWISE,
    LEARNING_RATE_SCHEDULE_LINEAR,
    FineTuningJob,
    Hyperparameters,
    LoraConfig,
    MetricPoint,
)
from luthier.v1.model_pb2 import HubSource, Model, ModelFile, Taught
from luthier.v1.reference_pb2 import Reference
from luthier.work import schema as work_schema

JOB = "projects/p/fineTuningJobs/one"
FAILURE = {
    "code": "RESOURCE_EXHAUSTED",
    "reason": "OUT_OF_MEMORY",
    "message": "it must fit",
    "metadata": {"micro_batch_tokens": "9"},
    "retry_after_seconds": 2.5,
}
TAUGHT: dict[str, Any] = {
    "chat_template": "{{ messages }}",
    "template_date": "2026-01-02",
    "prefix_token_ids": [1],
    "stop_token_ids": [2, 3],
    "tokenizer_digest": "t",
    "rendering": "projects/p/renderings/r",
    "rendering_digest": "d",
}
FILE: dict[str, Any] = {"path": "model.safetensors", "sha256": "a" * 64, "size_bytes": 7, "tokenizer": False}
HYPERPARAMETERS = {
    "num_epochs": 2,
    "max_steps": 9,
    "batch_tokens": 64,
    "batch_rows": 0,
    "micro_batch_tokens": 32,
    "learning_rate": 1e-3,
    "warmup_steps": 4,
    "learning_rate_schedule": "LINEAR",
    "weight_decay": 0.5,
    "max_grad_norm": 0.0,
    "seed": 11,
}
FIRST_BODY: dict[str, Any] = {
    "display_name": "",
    "base_model": "projects/p/models/base",
    "rendering": "projects/p/renderings/r",
    "base_model_digest": "b",
    "rendering_digest": "d",
    "lora": {"rank": 4, "alpha": 8.0, "target_modules": [], "use_rslora": False},
    "hyperparameters": HYPERPARAMETERS,
    "checkpoint_interval_steps": 5,
    "validation_interval_steps": 0,
    "tuned_model_id": "tuned",
}
"""What the first version wrote of a job."""
FULL_BODY: dict[str, Any] = {
    **FIRST_BODY,
    "display_name": "One",
    "hyperparameters": {**HYPERPARAMETERS, "batch_tokens": 0, "batch_rows": 8},
    "lora": {"rank": 4, "alpha": 8.0, "target_modules": ["q_proj"], "use_rslora": True},
    "max_checkpoints": 3,
    "taught": TAUGHT,
    "tuned_model": "projects/p/models/tuned",
    "progress": {"phase": "training", "completed": 5, "total": 9, "unit": "steps", "remaining_seconds": 1.5},
    "latest_metrics": {"train_loss": 0.25},
    "num_attempts": 2,
    "run_record": {
        "code_version": "0.1",
        "base_model_digest": "b",
        "rendering_digest": "d",
        "device": "cpu",
        "torch_version": "2",
        "num_threads": 3,
        "kernel_table_digest": "k",
        "kernels": {"isa": "avx2"},
        "determinism": "BITWISE",
    },
    "failure": FAILURE,
    "start_time": "2026-11-23T20:15:30.123457+00:00",
    "end_time": None,
}


class OldHome:
    """A database as it was before, and the same after the migration."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "training.db"
        self.url = f"sqlite+aiosqlite:///{self.path}"
        old = folder / "old"
        old.mkdir()
        for file in sorted(schema.MIGRATIONS.glob("training_000[123]_*.py")):
            shutil.copy(file, old)
        upgrade(self.url, [work_schema.MIGRATIONS, old])

    def insert(self, table: str, **columns: Any) -> None:
        values = [json.dumps(one) if isinstance(one, dict | list) else one for one in columns.values()]
        places = ", ".join("?" * len(values))
        with sqlite3.connect(self.path) as connection:
            connection.execute(f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({places})", values)
        connection.close()

    def add(self, table: str, name: str, state: str, body: Mapping[str, Any], **filters: str) -> None:
        standard = {"name": name, "parent": "projects/p", "uid": f"uid of {name}", "state": state}
        times = {"create_time_us": 1_000_001, "update_time_us": 2_000_002, "revision": 6}
        self.insert(table, **standard, labels={"team": "red"}, **times, body=dict(body), **filters)
        label = {
            "parent": "projects/p",
            "key": "team",
            "value": "red",
            "create_time_us": 1_000_001,
            "name": name,
        }
        self.insert(f"{table}_labels", **label)

    def migrated(self) -> Database:
        upgrade(self.url, [work_schema.MIGRATIONS, schema.MIGRATIONS])
        return Database(self.url)


@pytest.fixture
def home(tmp_path: Path) -> OldHome:
    return OldHome(tmp_path)


def add_job(home: OldHome, name: str, state: str, body: Mapping[str, Any]) -> None:
    home.add(
        "fine_tuning_jobs", name, state, body, base_model=body["base_model"], rendering=body["rendering"]
    )


async def test_a_job_keeps_all_that_it_said(home: OldHome) -> None:
    add_job(home, JOB, "FAILED", FULL_BODY)
    database = home.migrated()
    stored = await jobs.jobs().read(database, JOB)
    async with database.reading() as connection:
        equals = {"state": "FAILED", "rendering": FULL_BODY["rendering"], "labels.team": "red"}
        page = await page_of(jobs.jobs(), connection, "projects/p", 5, equals=equals)
    await database.close()
    assert page.values == (stored.message,)
    job = stored.message
    assert (stored.uid, stored.revision, job.uid, job.etag) == (f"uid of {JOB}", 6, f"uid of {JOB}", '"6"')
    assert (job.state, job.display_name, dict(job.labels)) == (job.STATE_FAILED, "One", {"team": "red"})
    assert job.create_time.ToMicroseconds() == 1_000_001
    assert job.update_time.ToMicroseconds() == 2_000_002
    assert job.start_time.ToJsonString() == "2026-11-23T20:15:30.123457Z"
    assert not job.HasField("end_time")
    assert job.lora == LoraConfig(rank=4, alpha=8.0, target_modules=["q_proj"], use_rslora=True)
    expected = {**FULL_BODY["hyperparameters"], "learning_rate_schedule": LEARNING_RATE_SCHEDULE_LINEAR}
    del expected["batch_tokens"]
    assert job.hyperparameters == Hyperparameters(**expected)
    assert (job.checkpoint_interval_steps, job.max_checkpoints) == (5, 3)
    assert (job.tuned_model_id, job.tuned_model) == ("tuned", "projects/p/models/tuned")
    assert (job.progress.phase, job.progress.completed, job.progress.remaining_seconds) == (
        "training",
        5,
        1.5,
    )
    assert dict(job.latest_metrics) == {"train_loss": 0.25}
    assert (job.num_attempts, job.run_record.num_threads, dict(job.run_record.kernels)) == (
        2,
        3,
        {"isa": "avx2"},
    )
    assert job.run_record.determinism == DETERMINISM_BITWISE
    failure = status_to_failure(job.error)
    assert (failure.code, failure.reason, failure.message) == (
        "RESOURCE_EXHAUSTED",
        "OUT_OF_MEMORY",
        "it must fit",
    )
    assert (dict(failure.metadata), failure.retry_after_seconds) == (FAILURE["metadata"], 2.5)
    assert (stored.private.base_model_digest, stored.private.rendering_digest) == ("b", "d")
    assert stored.private.taught == Taught(**TAUGHT)


async def test_a_job_that_succeeded_and_its_model_say_of_each_other_which_they_were(home: OldHome) -> None:
    add_job(home, JOB, "SUCCEEDED", FULL_BODY)
    adapter = {
        "kind": "ADAPTER",
        "base_model": FULL_BODY["base_model"],
        "fine_tuning_job": JOB,
        "digest": "d1",
    }
    filters = {field: adapter[field] for field in ("kind", "base_model", "fine_tuning_job")}
    tuned = FULL_BODY["tuned_model"]
    home.add("models", tuned, "READY", {**adapter, "step": 9, "files": [FILE], "taught": TAUGHT}, **filters)
    database = home.migrated()
    job = (await jobs.jobs().read(database, JOB)).message
    model = (await models.models().read(database, tuned)).message
    await database.close()
    rendering = Reference(name=TAUGHT["rendering"], digest="d")
    base = job.base_model
    assert list(job.references) == [
        Reference(name=base, digest="b"),
        rendering,
        Reference(name=tuned, uid=f"uid of {tuned}", digest="d1"),
    ]
    assert list(model.references) == [
        Reference(name=base),
        Reference(name=JOB, uid=f"uid of {JOB}"),
        rendering,
    ]


async def test_a_job_of_the_first_version_takes_the_defaults_of_its_day(home: OldHome) -> None:
    add_job(home, JOB, "QUEUED", FIRST_BODY)
    database = home.migrated()
    stored = await jobs.jobs().read(database, JOB)
    async with database.transaction() as connection:
        changed = stored.copy()
        changed.progress.completed = 3
        reported = await jobs.jobs().report(connection, stored, changed)
    await database.close()
    job = stored.message
    assert (job.state, job.max_checkpoints, job.num_attempts) == (FineTuningJob.STATE_QUEUED, 0, 0)
    assert (job.hyperparameters.WhichOneof("batch_size"), job.hyperparameters.batch_tokens) == (
        "batch_tokens",
        64,
    )
    assert job.hyperparameters.HasField("max_grad_norm")
    for unset in ("progress", "run_record", "error", "start_time", "end_time"):
        assert not job.HasField(unset), unset
    assert not stored.private.HasField("taught")
    assert (reported.message.progress.completed, reported.revision) == (3, 6)


async def test_checkpoints_and_metrics_follow_their_job(home: OldHome) -> None:
    add_job(home, JOB, "RUNNING", FULL_BODY)
    home.insert(
        "checkpoints",
        job=JOB,
        step=5,
        name=f"{JOB}/checkpoints/step-5",
        uid="c",
        attempt=2,
        metrics={"validation_loss": 0.5},
        files=[["adapter_model.safetensors", "a" * 64, 7]],
        digest="x",
        size_bytes=7,
        create_time_us=3_000_003,
    )
    for owner, step in ((JOB, 1), (JOB, 2), ("projects/p/fineTuningJobs/gone", 1)):
        home.insert(
            "metric_points", job=owner, step=step, attempt=1, metric_values={"train_loss": 2.0 / step}
        )
    database = home.migrated()
    async with database.reading() as connection:
        checkpoint = await jobs.Checkpoints().get(connection, f"{JOB}/checkpoints/step-5")
        latest = await jobs.Checkpoints().latest(connection, f"uid of {JOB}")
        points = await jobs.Metrics().after(connection, f"uid of {JOB}", 0, 10)
    await database.close()
    assert latest == checkpoint
    message = checkpoint.message
    assert (message.name, message.uid, message.step) == (f"{JOB}/checkpoints/step-5", "c", 5)
    assert (message.attempt, dict(message.metrics), message.digest) == (2, {"validation_loss": 0.5}, "x")
    assert (message.size_bytes, message.create_time.ToMicroseconds()) == (7, 3_000_003)
    (file,) = checkpoint.private.files
    assert (file.path, file.sha256, file.size_bytes) == ("adapter_model.safetensors", "a" * 64, 7)
    assert points == [MetricPoint(step=step, attempt=1, values={"train_loss": 2.0 / step}) for step in (1, 2)]


HUB = {"@type": "HubSource", "repo_id": "owner/model", "revision": "abc"}


@pytest.mark.parametrize(
    ("body", "expected", "files"),
    [
        ({"kind": "BASE", "source": HUB}, Model(hub=HubSource(repo_id="owner/model", revision="abc")), 0),
        (
            {"kind": "BASE", "source": {"@type": "DirectorySource", "directory": "/m"}, "failure": FAILURE},
            Model(directory="/m"),
            0,
        ),
        (
            {"kind": "BASE", "source": {"@type": "GgufSource", "gguf_path": "/m.gguf"}},
            Model(gguf_path="/m.gguf"),
            0,
        ),
        (
            {
                "kind": "ADAPTER",
                "display_name": "",
                "source": None,
                "base_model": "projects/p/models/base",
                "fine_tuning_job": JOB,
                "step": 9,
                "digest": "d",
                "has_chat_template": True,
                "eos_token_ids": [2],
                "warnings": ["w"],
                "files": [FILE],
                "failure": None,
                "taught": TAUGHT,
            },
            Model(
                base_model="projects/p/models/base",
                fine_tuning_job=JOB,
                step=9,
                digest="d",
                has_chat_template=True,
                eos_token_ids=[2],
                warnings=["w"],
                taught=Taught(**TAUGHT),
            ),
            1,
        ),
    ],
    ids=["hub", "directory", "gguf", "adapter"],
)
async def test_a_model_keeps_all_that_it_said(
    home: OldHome, body: dict[str, Any], expected: Model, files: int
) -> None:
    name = "projects/p/models/m"
    filters = {field: body.get(field, "") for field in ("base_model", "fine_tuning_job")}
    home.add("models", name, "READY", body, kind=body["kind"], **filters)
    database = home.migrated()
    stored = await models.models().read(database, name)
    async with database.reading() as connection:
        page = await page_of(models.models(), connection, "projects/p", 5, equals={"kind": body["kind"]})
    await database.close()
    assert page.values == (stored.message,)
    assert list(stored.private.files) == [ModelFile(**FILE)] * files
    told = stored.copy()
    assert told.HasField("error") == bool(body.get("failure"))
    assert (told.name, told.state, dict(told.labels)) == (name, Model.STATE_READY, {"team": "red"})
    for standard in ("name", "uid", "state", "labels", "create_time", "update_time", "etag", "error"):
        told.ClearField(standard)
    expected.kind = Model.Kind.Value(f"KIND_{body['kind']}")
    for made_from in (body.get("base_model"), body.get("fine_tuning_job")):
        if made_from:
            expected.references.add(name=made_from)
    if "taught" in body:
        expected.references.add(name=TAUGHT["rendering"], digest=TAUGHT["rendering_digest"])
    assert told == expected


@pytest.mark.parametrize("says", [True, False], ids=["says-how-it-was-taught", "does-not-say"])
async def test_a_model_needs_its_base_and_where_it_does_not_say_how_it_was_taught_its_job(
    home: OldHome, says: bool
) -> None:
    base, model = "projects/p/models/base", "projects/p/models/m"
    home.add(
        "models",
        base,
        "READY",
        {"kind": "BASE", "source": HUB},
        kind="BASE",
        base_model="",
        fine_tuning_job="",
    )
    add_job(home, JOB, "SUCCEEDED", FIRST_BODY)
    body = {"kind": "ADAPTER", "base_model": base, "fine_tuning_job": JOB, "step": 9, "digest": "d"}
    body["files"] = [FILE]
    taught = {"taught": TAUGHT} if says else {}
    home.add("models", model, "READY", body | taught, kind="ADAPTER", base_model=base, fine_tuning_job=JOB)
    database = home.migrated()
    async with database.reading() as connection:
        held = {
            row.held for row in await connection.execute(select(work_schema.holds)) if row.holder == model
        }
        elsewhere = {row.name for row in await connection.execute(select(work_schema.held_elsewhere))}
    await database.close()
    assert held == {f"uid of {base}"} | (set() if says else {f"uid of {JOB}"})
    assert elsewhere == (set() if says else {FIRST_BODY["rendering"]})
