"""Remember when resources told that they ended, as long as what they told before is there."""

import sqlalchemy as sa
from alembic import op

from luthier.v1.event_pb2 import Event

revision = "work_0016"
down_revision = "work_0015"
branch_labels = None
depends_on = None

_BATCH_ROWS = 500


def upgrade() -> None:
    """Add the column: an end was when its event says."""
    op.add_column("events", sa.Column("ended_at_us", sa.BigInteger))
    connection, uid, sequence = op.get_bind(), "", 0
    some = sa.text(
        "SELECT uid, sequence, event FROM events WHERE final AND (uid, sequence) > (:uid, :sequence) "
        f"ORDER BY uid, sequence LIMIT {_BATCH_ROWS}"
    )
    written = sa.text("UPDATE events SET ended_at_us = :at WHERE uid = :uid AND sequence = :sequence")
    while rows := connection.execute(some, {"uid": uid, "sequence": sequence}).all():
        ends = [{"uid": row.uid, "sequence": row.sequence, "at": _microseconds(row.event)} for row in rows]
        connection.execute(written, ends)
        uid, sequence = rows[-1].uid, rows[-1].sequence
    is_end = sa.text("ended_at_us IS NOT NULL")
    op.create_index("ix_events_ended", "events", ["ended_at_us"], sqlite_where=is_end)


def downgrade() -> None:
    """Drop it."""
    op.drop_index("ix_events_ended", "events")
    with op.batch_alter_table("events") as batch:
        batch.drop_column("ended_at_us")


def _microseconds(event: bytes) -> int:
    return int(Event.FromString(event).event_time.ToMicroseconds())
