"""Store resources as messages keyed by uid, and the errors of versions and renderings in one table."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.engine import RowMapping

from luthier.storage.json_rows import NewRow, move, status
from luthier.stored.v1.data_pb2 import DatasetPrivate, DatasetVersionPrivate, RenderingPrivate, UploadPrivate
from luthier.v1.dataset_pb2 import (
    Dataset,
    DatasetFormat,
    DatasetSource,
    DatasetStatistics,
    DatasetVersion,
    InvalidRecordPolicy,
    RecordError,
    Split,
    SplitSettings,
    SplitStatistics,
)
from luthier.v1.rendering_pb2 import (
    LengthPolicy,
    LengthStatistics,
    MaskMode,
    Rendering,
    RenderingFinding,
    RenderingFindingRecord,
    RenderingSplitStatistics,
    TemplateErrorPolicy,
    UnsupervisedRecord,
)
from luthier.v1.upload_pb2 import Upload
from luthier.worker.v1.task_pb2 import BlobFile, Shard

revision = "data_0004"
down_revision = "data_0003"
branch_labels = None
depends_on = None

_BATCH_ROWS = 500
_ERRORS = {"dataset_version_errors": "version", "rendering_errors": "rendering"}
"""The tables of errors, and the column that names whose they are."""
_FAMILIES = {"dataset_version_errors": "dataset_versions", "rendering_errors": "renderings"}


def upgrade() -> None:
    """Move every row; uploads whose bytes are staged are known by uid alone."""
    move("datasets", ["state"], _dataset, has_state=False)
    move("dataset_versions", ["state"], _version)
    move("uploads", ["state"], _upload)
    move("renderings", ["state"], _rendering)
    _move_errors()
    with op.batch_alter_table("staged_uploads") as table:
        table.drop_column("upload")


def downgrade() -> None:
    """Refuse: what was written since cannot become JSON again."""
    raise NotImplementedError("rows of messages cannot become JSON again; restore a backup")


def _dataset(row: RowMapping) -> NewRow:
    return NewRow(message=Dataset(display_name=row["body"].get("display_name", "")), private=DatasetPrivate())


def _version(row: RowMapping) -> NewRow:
    body = row["body"]
    settings = body.get("split_settings") or {}
    message = DatasetVersion(
        sources=[
            DatasetSource(
                upload=source["upload"],
                split=_enum(Split, "SPLIT_", source.get("split")),
                format=_enum(DatasetFormat, "DATASET_FORMAT_", source.get("format")),
                filename=source.get("filename", ""),
                detected_format=_enum(DatasetFormat, "DATASET_FORMAT_", source.get("detected_format")),
            )
            for source in body["sources"]
        ],
        invalid_record_policy=_enum(
            InvalidRecordPolicy, "INVALID_RECORD_POLICY_", body.get("invalid_record_policy", "STRICT")
        ),
        split_settings=SplitSettings(**settings),
        digest=body.get("digest", ""),
        statistics=_statistics(body["statistics"]) if body.get("statistics") else None,
        error=status(body["failure"]) if body.get("failure") else None,
    )
    private = DatasetVersionPrivate(
        source_files=[
            BlobFile(path=source["filename"], sha256=source["digest"], size_bytes=source["size_bytes"])
            for source in body["sources"]
        ],
        shards=_shards(body),
    )
    return NewRow(message=message, private=private)


def _upload(row: RowMapping) -> NewRow:
    body = row["body"]
    message = Upload(
        filename=body["filename"],
        size_bytes=body.get("size_bytes", 0),
        sha256=body.get("sha256", ""),
        persisted_size_bytes=body.get("persisted_size_bytes", 0),
    )
    return NewRow(message=message, private=UploadPrivate(sha256=body.get("digest", "")))


def _rendering(row: RowMapping) -> NewRow:
    body = row["body"]
    mask_mode = body.get("mask_mode", "DEFAULT")
    message = Rendering(
        dataset_version=body["dataset_version"],
        model=body["model"],
        chat_template=body.get("chat_template", ""),
        mask_mode=_enum(MaskMode, "MASK_MODE_", None if mask_mode == "DEFAULT" else mask_mode),
        max_tokens=body.get("max_tokens", 0),
        length_policy=_enum(LengthPolicy, "LENGTH_POLICY_", body.get("length_policy", "DROP")),
        tokenizer_digest=body.get("tokenizer_digest", ""),
        template_date=body.get("template_date", ""),
        split_statistics=[_rendering_statistics(one) for one in body.get("split_statistics", ())],
        unsupervised_records=[UnsupervisedRecord(**one) for one in body.get("unsupervised_records", ())],
        warnings=body.get("warnings", ()),
        digest=body.get("digest", ""),
        error=status(body["failure"]) if body.get("failure") else None,
        split_turns=body.get("split_turns", False),
        template_error_policy=_enum(
            TemplateErrorPolicy, "TEMPLATE_ERROR_POLICY_", body.get("template_error_policy", "STRICT")
        ),
        num_errors=body.get("num_errors", 0),
        findings=[_finding(one) for one in body.get("findings", ())],
        effective_chat_template=body.get("effective_template", ""),
        prefix_token_ids=body.get("prefix_token_ids", ()),
        stop_token_ids=body.get("stop_token_ids", ()),
    )
    private = RenderingPrivate(
        model_digest=body.get("model_digest", ""),
        shards=_shards(body),
        tokenizer_sha256=body.get("tokenizer_blob", ""),
    )
    return NewRow(message=message, private=private)


def _statistics(stored: Mapping[str, Any]) -> DatasetStatistics:
    splits = [
        SplitStatistics(**{**one, "split": _enum(Split, "SPLIT_", one["split"])}) for one in stored["splits"]
    ]
    return DatasetStatistics(**{**stored, "splits": splits})


def _rendering_statistics(stored: Mapping[str, Any]) -> RenderingSplitStatistics:
    filled = {
        "split": _enum(Split, "SPLIT_", stored["split"]),
        "tokens": LengthStatistics(**stored["tokens"]),
        "supervised_tokens": LengthStatistics(**stored["supervised_tokens"]),
    }
    return RenderingSplitStatistics(**{**stored, **filled})


def _finding(stored: Mapping[str, Any]) -> RenderingFinding:
    return RenderingFinding(
        kind=_enum(RenderingFinding.Kind, "KIND_", stored["kind"]),
        num_records=stored["num_records"],
        records=[RenderingFindingRecord(**one) for one in stored["records"]],
    )


def _shards(body: Mapping[str, Any]) -> list[Shard]:
    return [
        Shard(
            file=BlobFile(path=one["path"], sha256=one["digest"], size_bytes=one["size_bytes"]),
            first_row=one["first_row"],
            num_rows=one["num_rows"],
        )
        for one in body.get("shards", ())
    ]


def _enum(wire: Any, prefix: str, name: str | None) -> Any:
    return wire.Value(prefix + (name or "UNSPECIFIED"))


def _move_errors() -> None:
    made = op.create_table(
        "record_errors",
        sa.Column("owner", sa.String, primary_key=True),
        sa.Column("position", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("message", sa.LargeBinary, nullable=False),
    )
    assert made is not None, "Alembic returns the table that it created"
    connection = op.get_bind()
    for table in _ERRORS:
        rows = _errors(table)
        while batch := list(itertools.islice(rows, _BATCH_ROWS)):
            connection.execute(sa.insert(made), batch)
        op.drop_table(table)


def _errors(table: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table of errors; those of a resource that is gone have no owner any more."""
    statement = (
        f"SELECT owner.uid AS owner, error.* FROM {table} AS error JOIN {_FAMILIES[table]} AS owner ON "
    )
    found = op.get_bind().execute(sa.text(f"{statement} owner.name = error.{_ERRORS[table]}"))
    for row in found.mappings():
        told = ("filename", "line", "path", "reason", "message", "value")
        error = RecordError(**{field: row[field] for field in told if field in row})
        yield {
            "owner": row["owner"],
            "position": row["position"],
            "message": error.SerializeToString(deterministic=True),
        }
