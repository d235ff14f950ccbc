"""Tables of the Data service, beside those of the work package."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import BigInteger, Boolean, Column, Integer, MetaData, String, Table

from luthier.storage.resources import resource_table

metadata = MetaData()
MIGRATIONS = Path(__file__).parent / "migrations" / "versions"

datasets = resource_table("datasets", metadata)
dataset_versions = resource_table("dataset_versions", metadata)
uploads = resource_table("uploads", metadata)
renderings = resource_table("renderings", metadata)

dataset_version_errors = Table(
    "dataset_version_errors",
    metadata,
    Column("version", String, primary_key=True),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("filename", String, nullable=False),
    Column("line", BigInteger, nullable=False),
    Column("path", String, nullable=False),
    Column("reason", String, nullable=False),
    Column("message", String, nullable=False),
    Column("value", String, nullable=False),
)

rendering_errors = Table(
    "rendering_errors",
    metadata,
    Column("rendering", String, primary_key=True),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("filename", String, nullable=False),
    Column("line", BigInteger, nullable=False),
    Column("reason", String, nullable=False),
    Column("message", String, nullable=False),
)

staged_uploads = Table(
    "staged_uploads",
    metadata,
    Column("uid", String, primary_key=True),
    Column("upload", String, nullable=False),
    Column("finishing", Boolean, nullable=False),
)
