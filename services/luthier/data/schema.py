"""Tables of the Data service, beside those of the work package."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Boolean, Column, Integer, LargeBinary, MetaData, String, Table

from luthier.storage.message_tables import message_table

metadata = MetaData()
MIGRATIONS = Path(__file__).parent / "migrations" / "versions"

datasets = message_table("datasets", metadata, has_state=False)
dataset_versions = message_table("dataset_versions", metadata)
uploads = message_table("uploads", metadata)
renderings = message_table("renderings", metadata)

record_errors = Table(
    "record_errors",
    metadata,
    Column("owner", String, primary_key=True),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("message", LargeBinary, nullable=False),
)

staged_uploads = Table(
    "staged_uploads",
    metadata,
    Column("uid", String, primary_key=True),
    Column("finishing", Boolean, nullable=False),
)
