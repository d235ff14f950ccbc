"""Limits of what the results of both kinds of data tasks hold."""

from __future__ import annotations

from luthier.runtime.field_limits import ANY, REQUIRED, LimitTable, count, under
from luthier.runtime.result_limits import FILE, TEXT

MAX_ERRORS = 1000
"""Bad records of a version or a rendering that are kept; all are counted."""
MAX_SHARDS = 20_000
"""Of a version or a rendering: five terabytes of records, or a billion short ones."""

SHARDS: LimitTable = {
    "shards": count(MAX_SHARDS, "shards"),
    **under("shards[].file", FILE),
    # The shards must follow one another, which no field says alone.
    "shards[].first_row": ANY,
    "shards[].num_rows": ANY,
}
ERRORS: LimitTable = {
    "errors": count(MAX_ERRORS, "bad records"),
    "errors[].filename": (REQUIRED, TEXT),
    "errors[].line": ANY,
    "errors[].path": TEXT,
    "errors[].reason": (REQUIRED, TEXT),
    "errors[].message": TEXT,
    "errors[].value": TEXT,
}
