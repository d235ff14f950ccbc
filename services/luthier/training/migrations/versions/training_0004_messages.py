"""Store resources as messages keyed by uid, and checkpoints and metrics by the uid of their job."""

from collections.abc import Callable, Mapping
from typing import Any

import sqlalchemy as sa
from alembic import op
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from sqlalchemy.engine import RowMapping

from luthier.storage.json_rows import NewRow, move, status
from luthier.stored.v1.training_pb2 import CheckpointPrivate, FineTuningJobPrivate, ModelPrivate
from luthier.v1.event_pb2 import Progress
from luthier.v1.fine_tuning_job_pb2 import (
    Checkpoint,
    Determinism,
    FineTuningJob,
    Hyperparameters,
    LearningRateSchedule,
    LoraConfig,
    MetricPoint,
    RunRecord,
)
from luthier.v1.model_pb2 import HubSource, Model, ModelFile, Taught
from luthier.worker.v1.task_pb2 import BlobFile

revision = "training_0004"
down_revision = "training_0003"
branch_labels = None
depends_on = None

_MODEL_FILTERS = ("state", "kind", "base_model", "fine_tuning_job")
_JOB_FILTERS = ("state", "base_model", "rendering")
_BATCH_ROWS = 500


def upgrade() -> None:
    """Move every row. What belongs to a job that is not there goes."""
    move("models", _MODEL_FILTERS, _model)
    move("fine_tuning_jobs", _JOB_FILTERS, _job)
    op.drop_index("ix_checkpoints_name", "checkpoints")
    blob = sa.LargeBinary
    _move_history("checkpoints", {"message": blob, "private": blob}, ("metrics", "files"), _checkpoint)
    _move_history("metric_points", {"message": blob}, ("metric_values",), _metric_point)


def downgrade() -> None:
    """Refuse: what was written since cannot become JSON again."""
    raise NotImplementedError("rows of messages cannot become JSON again; restore a backup")


def _model(row: RowMapping) -> NewRow:
    body = row["body"]
    plain = (
        "display_name",
        "base_model",
        "fine_tuning_job",
        "step",
        "digest",
        "tokenizer_digest",
        "architecture",
        "num_parameters",
        "context_length",
        "has_chat_template",
        "eos_token_ids",
        "warnings",
    )
    message = Model(
        kind=Model.Kind.Value(f"KIND_{body['kind']}"),
        error=status(body["failure"]) if body.get("failure") else None,
        taught=Taught(**body["taught"]) if body.get("taught") else None,
        **{field: body[field] for field in plain if field in body},
        **_source(body.get("source")),
    )
    private = ModelPrivate(files=[ModelFile(**file) for file in body.get("files", ())])
    return NewRow(message=message, private=private, columns=_columns(row, _MODEL_FILTERS))


def _source(stored: Mapping[str, Any] | None) -> dict[str, Any]:
    if stored is None:
        return {}
    told = {key: value for key, value in stored.items() if key != "@type"}
    return {"hub": HubSource(**told)} if stored["@type"] == "HubSource" else told


def _job(row: RowMapping) -> NewRow:
    body = row["body"]
    plain = (
        "display_name",
        "base_model",
        "rendering",
        "checkpoint_interval_steps",
        "validation_interval_steps",
        "max_checkpoints",
        "tuned_model_id",
        "tuned_model",
        "num_attempts",
    )
    message = FineTuningJob(
        lora=LoraConfig(**body["lora"]),
        hyperparameters=_hyperparameters(body["hyperparameters"]),
        run_record=_run_record(body["run_record"]) if body.get("run_record") else None,
        error=status(body["failure"]) if body.get("failure") else None,
        start_time=_time(body.get("start_time")),
        end_time=_time(body.get("end_time")),
        **{field: body[field] for field in plain if field in body},
    )
    progress = FineTuningJob(
        progress=Progress(**body["progress"]) if body.get("progress") else None,
        latest_metrics=body.get("latest_metrics", {}),
    )
    private = FineTuningJobPrivate(
        base_model_digest=body["base_model_digest"],
        rendering_digest=body["rendering_digest"],
        taught=Taught(**body["taught"]) if body.get("taught") else None,
    )
    columns = _columns(row, _JOB_FILTERS)
    return NewRow(message=message, private=private, progress=progress, columns=columns)


def _columns(row: RowMapping, filters: tuple[str, ...]) -> dict[str, str]:
    return {column: row[column] for column in filters if column != "state"}


def _hyperparameters(stored: Mapping[str, Any]) -> Hyperparameters:
    unused = "batch_tokens" if stored["batch_rows"] else "batch_rows"
    schedule = LearningRateSchedule.Value(f"LEARNING_RATE_SCHEDULE_{stored['learning_rate_schedule']}")
    told = {field: value for field, value in stored.items() if field != unused}
    return Hyperparameters(**{**told, "learning_rate_schedule": schedule})


def _run_record(stored: Mapping[str, Any]) -> RunRecord:
    return RunRecord(**{**stored, "determinism": Determinism.Value(f"DETERMINISM_{stored['determinism']}")})


def _time(stored: str | None) -> Timestamp | None:
    if not stored:
        return None
    time = Timestamp()
    time.FromJsonString(stored)
    return time


def _move_history(
    table: str,
    blobs: Mapping[str, type[sa.LargeBinary]],
    json_columns: tuple[str, ...],
    convert: Callable[[RowMapping], dict[str, Message]],
) -> None:
    """Make a table of what jobs leave behind, by name and step, one of messages by uid and step."""
    old = f"{table}_json"
    op.rename_table(table, old)
    made = op.create_table(
        table,
        sa.Column("job", sa.String, primary_key=True),
        sa.Column("step", sa.BigInteger, primary_key=True, autoincrement=False),
        *(sa.Column(column, type_, nullable=False) for column, type_ in blobs.items()),
    )
    assert made is not None, "Alembic returns the table that it created"
    statement = sa.text(
        f"SELECT fine_tuning_jobs.uid AS job_uid, {old}.* FROM {old} "
        f"JOIN fine_tuning_jobs ON fine_tuning_jobs.name = {old}.job"
    ).columns(**dict.fromkeys(json_columns, sa.JSON))
    connection = op.get_bind()
    rows = connection.execute(statement).mappings()
    while batch := rows.fetchmany(_BATCH_ROWS):
        connection.execute(sa.insert(made), [_history_row(row, convert(row)) for row in batch])
    op.drop_table(old)


def _history_row(row: RowMapping, messages: Mapping[str, Message]) -> dict[str, Any]:
    stored = {column: one.SerializeToString(deterministic=True) for column, one in messages.items()}
    return {"job": row["job_uid"], "step": row["step"], **stored}


def _checkpoint(row: RowMapping) -> dict[str, Message]:
    told = ("name", "uid", "step", "attempt", "metrics", "digest", "size_bytes")
    message = Checkpoint(**{field: row[field] for field in told})
    message.create_time.FromMicroseconds(row["create_time_us"])
    files = [BlobFile(path=path, sha256=sha256, size_bytes=size) for path, sha256, size in row["files"]]
    return {"message": message, "private": CheckpointPrivate(files=files)}


def _metric_point(row: RowMapping) -> dict[str, Message]:
    values = row["metric_values"]
    return {"message": MetricPoint(step=row["step"], attempt=row["attempt"], values=values)}
