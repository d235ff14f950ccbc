"""Tables of the Training service, beside those of the work package."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import BigInteger, Column, Integer, LargeBinary, MetaData, String, Table

from luthier.storage.message_tables import message_table

metadata = MetaData()
MIGRATIONS = Path(__file__).parent / "migrations" / "versions"

models = message_table(
    "models",
    metadata,
    Column("kind", String, nullable=False),
    Column("base_model", String, nullable=False),
    Column("fine_tuning_job", String, nullable=False),
    Column("base_model_uid", String, nullable=False, server_default=""),
    Column("fine_tuning_job_uid", String, nullable=False, server_default=""),
)

fine_tuning_jobs = message_table(
    "fine_tuning_jobs",
    metadata,
    Column("base_model", String, nullable=False),
    Column("rendering", String, nullable=False),
    Column("base_model_uid", String, nullable=False, server_default=""),
    Column("rendering_uid", String, nullable=False, server_default=""),
)

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("job", String, primary_key=True),
    Column("step", BigInteger, primary_key=True, autoincrement=False),
    Column("message", LargeBinary, nullable=False),
    Column("private", LargeBinary, nullable=False),
)

rollouts = Table(
    "rollouts",
    metadata,
    Column("job", String, primary_key=True),
    Column("step", BigInteger, primary_key=True, autoincrement=False),
    Column("attempt", Integer, nullable=False),
    Column("digest", String, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("num_rollouts", BigInteger, nullable=False),
)

metric_points = Table(
    "metric_points",
    metadata,
    Column("job", String, primary_key=True),
    Column("step", BigInteger, primary_key=True, autoincrement=False),
    Column("message", LargeBinary, nullable=False),
)

OF_JOBS = (checkpoints, metric_points, rollouts)
"""Tables with rows of jobs, whose uid is in the column `job`."""
