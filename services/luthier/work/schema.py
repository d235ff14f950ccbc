"""Tables of the work package, part of every service's database."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    UniqueConstraint,
    false,
    true,
)

from luthier.storage import blob_refs, identity
from luthier.storage.dialect import index_of

metadata = MetaData()
for _table in (*blob_refs.metadata.tables.values(), *identity.metadata.tables.values()):
    _table.to_metadata(metadata)
MIGRATIONS = Path(__file__).parent / "migrations" / "versions"

tasks = Table(
    "tasks",
    metadata,
    Column("task_id", String, primary_key=True),
    Column("kind", String, nullable=False),
    Column("uid", String, nullable=False),
    Column("subject", String, nullable=False),
    Column("project", String, nullable=False),
    Column("resources", JSON, nullable=False),
    Column("state", String, nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("worker", String, nullable=False),
    Column("cancel_requested", Boolean, nullable=False),
    Column("last_local_number", BigInteger, nullable=False),
    Column("queued_at_us", BigInteger, nullable=False),
    Column("losses", Integer, nullable=False, server_default="0"),
    Column("claim", String, nullable=False, server_default=""),
    Column("not_before_us", BigInteger, nullable=False, server_default="0"),
    Column("ended_at_us", BigInteger, nullable=False, server_default="0"),
    Column("delays", Integer, nullable=False, server_default="0"),
    Column("heard", Boolean, nullable=False, server_default=true()),
    Column("required_device", String, nullable=False, server_default=""),
    Column("required_memory_bytes", BigInteger, nullable=False, server_default="0"),
    Column("said", String, nullable=False, server_default=""),
    Column("told", Boolean, nullable=False, server_default=false()),
    Column("share", Integer, nullable=False, server_default="0"),
    Column("required_ranks", Integer, nullable=False, server_default="0"),
    Column("turn_at_us", BigInteger, nullable=False, server_default="0"),
    Column("traceparent", String, nullable=False, server_default=""),
    Column("attempt_traceparent", String, nullable=False, server_default=""),
    Column("pause_requested", Boolean, nullable=False, server_default=false()),
    UniqueConstraint("uid", "share", name="uq_tasks_uid_share"),
    Index("ix_tasks_state_kind", "state", "kind", "queued_at_us"),
    Index("ix_tasks_state_ended", "state", "ended_at_us"),
)

events = Table(
    "events",
    metadata,
    Column("uid", String, primary_key=True),
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("final", Boolean, nullable=False),
    Column("event", LargeBinary, nullable=False),
    Column("ended_at_us", BigInteger),
)
Index("ix_events_ended", events.c.ended_at_us, **index_of(events.c.ended_at_us.is_not(None)))

holds = Table(
    "holds",
    metadata,
    Column("held", String, primary_key=True),
    Column("hold", String, primary_key=True),
    Column("holder", String, nullable=False),
    Column("lasting", Boolean, nullable=False),
    Column("expire_time_us", BigInteger),
    Column("holder_deleted", Boolean, nullable=False, server_default=false()),
    Column("held_deleted", Boolean, nullable=False, server_default=false()),
    Index("ix_holds_hold", "hold"),
)

held_elsewhere = Table(
    "held_elsewhere",
    metadata,
    Column("hold", String, primary_key=True),
    Column("name", String, nullable=False),
    Column("uid", String, nullable=False),
    Column("holder_uid", String, nullable=False),
    Column("holder", String, nullable=False),
    Column("released", Boolean, nullable=False),
    Index("ix_held_elsewhere_holder", "holder_uid"),
)

deliveries = Table(
    "deliveries",
    metadata,
    Column("delivery_id", String, primary_key=True),
    Column("uid", String, nullable=False),
    Column("number", Integer, nullable=False),
    Column("name", String, nullable=False),
    Column("event_type", String, nullable=False),
    Column("url", String, nullable=False),
    Column("project", String, nullable=False),
    Column("host", String, nullable=False),
    Column("origin", String, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("state", String, nullable=False),
    Column("created_at_us", BigInteger, nullable=False),
    Column("not_before_us", BigInteger, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("last_attempt_at_us", BigInteger, nullable=False),
    Column("last_status_code", Integer, nullable=False),
    Column("last_error", String, nullable=False),
    Column("ended_at_us", BigInteger, nullable=False),
    UniqueConstraint("uid", "number", name="uq_deliveries_uid_number"),
    Index("ix_deliveries_due", "state", "host", "origin", "project", "attempts", "not_before_us"),
    Index("ix_deliveries_created", "state", "created_at_us"),
    Index("ix_deliveries_ended", "state", "ended_at_us"),
)

request_log = Table(
    "request_log",
    metadata,
    Column("principal", String, primary_key=True),
    Column("method", String, primary_key=True),
    Column("request_id", String, primary_key=True),
    Column("fingerprint", String, nullable=False),
    Column("response", LargeBinary, nullable=False),
    Column("created_at_us", BigInteger, nullable=False),
    Index("ix_request_log_created", "created_at_us"),
)
