"""Limits of what the results of tasks hold alike, whatever they are of.

A family's table of a result names every field that a worker may say. What it says of a field may be `ANY`, or `UNSAID`
where a message holds it that the service alone writes.
"""

from __future__ import annotations

from luthier.runtime.field_limits import ANY, DIGEST, REQUIRED, Limit, LimitTable, characters, count

UNSAID = Limit(rule="must not be set, as the service writes it", allows=lambda _: False)
"""Nothing: it is not a worker's to say."""
TEXT = characters(1 << 16)
"""What a program writes for people: far beyond any sentence."""
TOKEN_IDS = count(1 << 16, "tokens")
FILE: LimitTable = {"path": REQUIRED, "sha256": (REQUIRED, DIGEST), "size_bytes": ANY}
"""A file that was stored."""
WARNINGS: LimitTable = {"warnings": count(1000, "warnings"), "warnings[]": TEXT}
