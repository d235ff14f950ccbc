"""Tables of the Evaluation service, beside those of the work package."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import BigInteger, Column, Integer, LargeBinary, MetaData, String, Table

from luthier.storage.message_tables import message_table

metadata = MetaData()
MIGRATIONS = Path(__file__).parent / "migrations" / "versions"

evaluations = message_table("evaluations", metadata)
model_aliases = message_table("model_aliases", metadata, has_state=False)

alias_moves = Table(
    "alias_moves",
    metadata,
    Column("owner", String, primary_key=True),
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("move", LargeBinary, nullable=False),
)

predictions = Table(
    "predictions",
    metadata,
    Column("owner", String, primary_key=True),
    Column("row", BigInteger, primary_key=True, autoincrement=False),
    Column("prediction", LargeBinary, nullable=False),
)

answer_files = Table(
    "answer_files",
    metadata,
    Column("owner", String, primary_key=True),
    Column("share", Integer, primary_key=True, autoincrement=False, server_default="0"),
    Column("step", BigInteger, primary_key=True, autoincrement=False),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("path", String, nullable=False),
    Column("sha256", String, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
)

shares = Table(
    "shares",
    metadata,
    Column("owner", String, primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("share", LargeBinary, nullable=False),
)

OF_EVALUATIONS = (predictions, answer_files, shares)
"""Tables with rows of evaluations, whose uid is in the column `owner`."""
