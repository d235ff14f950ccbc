"""Tables of the Training service, beside those of the work package."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import JSON, BigInteger, Column, Index, Integer, MetaData, String, Table

from luthier.storage.resources import resource_table

metadata = MetaData()
MIGRATIONS = Path(__file__).parent / "migrations" / "versions"

models = resource_table(
    "models",
    metadata,
    Column("kind", String, nullable=False),
    Column("base_model", String, nullable=False),
    Column("fine_tuning_job", String, nullable=False),
)

fine_tuning_jobs = resource_table(
    "fine_tuning_jobs",
    metadata,
    Column("base_model", String, nullable=False),
    Column("rendering", String, nullable=False),
)

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("job", String, primary_key=True),
    Column("step", BigInteger, primary_key=True, autoincrement=False),
    Column("name", String, nullable=False),
    Column("uid", String, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("metrics", JSON, nullable=False),
    Column("files", JSON, nullable=False),
    Column("digest", String, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("create_time_us", BigInteger, nullable=False),
    Index("ix_checkpoints_name", "name", unique=True),
)

released_blobs = Table(
    "released_blobs",
    metadata,
    Column("digest", String, primary_key=True),
    Column("release_time_us", BigInteger, nullable=False),
)

metric_points = Table(
    "metric_points",
    metadata,
    Column("job", String, primary_key=True),
    Column("step", BigInteger, primary_key=True, autoincrement=False),
    Column("attempt", Integer, nullable=False),
    Column("metric_values", JSON, nullable=False),
)
