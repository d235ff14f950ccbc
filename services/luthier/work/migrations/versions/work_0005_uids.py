"""Key tasks and events by the uid of their resource, store events as messages, and keep who needs what.

Which uid a name has only the tables of each service's own resources tell: their next revision writes it in place of
the name that is written here.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from alembic import op

from luthier.errors import DataLoss
from luthier.storage.json_rows import status
from luthier.v1.event_pb2 import (
    AttemptChange,
    CheckpointCommitted,
    Event,
    LogLine,
    MetricValues,
    Progress,
    StateChange,
)

revision = "work_0005"
down_revision = "work_0004"
branch_labels = None
depends_on = None

_BATCH_ROWS = 2000


def upgrade() -> None:
    """Move every row."""
    _move_tasks()
    _move_events()
    op.create_table(
        "holds",
        sa.Column("held", sa.String, primary_key=True),
        sa.Column("hold", sa.String, primary_key=True),
        sa.Column("holder", sa.String, nullable=False),
        sa.Column("lasting", sa.Boolean, nullable=False),
        sa.Column("expire_time_us", sa.BigInteger),
    )
    op.create_index("ix_holds_hold", "holds", ["hold"])
    op.create_table(
        "held_elsewhere",
        sa.Column("hold", sa.String, primary_key=True),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("uid", sa.String, nullable=False),
        sa.Column("holder_uid", sa.String, nullable=False),
        sa.Column("holder", sa.String, nullable=False),
        sa.Column("released", sa.Boolean, nullable=False),
    )
    op.create_index("ix_held_elsewhere_holder", "held_elsewhere", ["holder_uid"])


def downgrade() -> None:
    """Refuse: names that were used again since cannot be keys."""
    raise NotImplementedError("rows by uid cannot become rows by name again; restore a backup")


def _move_tasks() -> None:
    with op.batch_alter_table("tasks") as batch:
        batch.add_column(sa.Column("uid", sa.String, nullable=False, server_default=""))
        batch.drop_constraint("uq_tasks_subject", type_="unique")
    op.execute("UPDATE tasks SET uid = subject")
    with op.batch_alter_table("tasks") as batch:
        batch.alter_column("uid", server_default=None)
        batch.create_unique_constraint("uq_tasks_uid", ["uid"])


def _move_events() -> None:
    op.rename_table("events", "events_json")
    op.create_table(
        "events",
        sa.Column("uid", sa.String, primary_key=True),
        sa.Column("sequence", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("final", sa.Boolean, nullable=False),
        sa.Column("event", sa.LargeBinary, nullable=False),
    )
    connection = op.get_bind()
    # By the driver's own statements: there may be millions, and SQLAlchemy's take three times as long for each.
    rows = connection.exec_driver_sql(
        "SELECT subject, sequence, event_time_us, attempt, step, kind, payload FROM events_json"
    )
    while batch := rows.fetchmany(_BATCH_ROWS):
        moved = [_moved(row) for row in batch]
        connection.exec_driver_sql(
            "INSERT INTO events (uid, sequence, final, event) VALUES (?, ?, ?, ?)", moved
        )
    op.drop_table("events_json")


def _moved(row: Sequence[Any]) -> tuple[str, int, bool, bytes]:
    try:
        return _row(row)
    except (ValueError, KeyError, TypeError) as error:
        subject, sequence = row[0], row[1]
        raise DataLoss(
            f"event {sequence} of {subject} cannot be read by this version: {type(error).__name__}: {error}; the "
            "database is as it was, start the version that wrote it",
            metadata={"name": subject, "sequence": str(sequence)},
        ) from error


def _row(row: Sequence[Any]) -> tuple[str, int, bool, bytes]:
    subject, sequence, event_time_us, attempt, step, kind, stored = row
    payload = json.loads(stored)
    event = Event(sequence=sequence, attempt=attempt, step=step, **{kind: _PAYLOADS[kind](payload)})
    event.event_time.FromMicroseconds(event_time_us)
    return subject, sequence, bool(payload.get("final")), event.SerializeToString()


def _state_change(stored: Mapping[str, Any]) -> StateChange:
    error = status(stored["failure"]) if stored["failure"] is not None else None
    return StateChange(state=stored["state"], message=stored["message"], error=error)


def _log_line(stored: Mapping[str, Any]) -> LogLine:
    return LogLine(severity=LogLine.Severity.Value(f"SEVERITY_{stored['severity']}"), text=stored["text"])


def _attempt_change(stored: Mapping[str, Any]) -> AttemptChange:
    kind = AttemptChange.Kind.Value(f"KIND_{stored['kind']}")
    return AttemptChange(kind=kind, worker=stored["worker"], message=stored["message"])


_PAYLOADS: Mapping[str, Any] = {
    "state_change": _state_change,
    "progress": lambda stored: Progress(**stored),
    "metrics": lambda stored: MetricValues(values=stored["values"]),
    "checkpoint": lambda stored: CheckpointCommitted(**stored),
    "log": _log_line,
    "attempt_change": _attempt_change,
}
