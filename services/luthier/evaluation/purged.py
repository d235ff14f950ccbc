"""What of the Evaluation service is purged, what holds others before those."""

from __future__ import annotations

from luthier.evaluation import schema
from luthier.evaluation.aliases import repository as alias_rows
from luthier.evaluation.evaluations import repository as evaluation_rows
from luthier.work.purging import Purged

PURGED = (
    Purged(rows=alias_rows.aliases(), parts=[schema.alias_moves.c.owner]),
    Purged(rows=evaluation_rows.evaluations(), parts=[table.c.owner for table in schema.OF_EVALUATIONS]),
)
"""Each family, and the tables with rows of its resources."""
