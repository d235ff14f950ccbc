"""Statements are compiled once for all databases of a process: an engine would compile each of its own anew.

Hundreds of tests open a database and say to it what others said to theirs. What SQLAlchemy makes of a statement depends
on the dialect and its options, which are the same for all of our engines of a kind.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import pytest
from sqlalchemy.dialects.sqlite.aiosqlite import SQLiteDialect_aiosqlite
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite
from sqlalchemy.engine import Engine
from sqlalchemy.util import LRUCache

DIALECTS = (SQLiteDialect_aiosqlite, SQLiteDialect_pysqlite)
NUM_STATEMENTS = 4_000


@contextmanager
def compiling_once() -> Iterator[None]:
    """For the length of a block, have engines of one dialect share what they have compiled."""
    compiled: LRUCache[Any, Any] = LRUCache(NUM_STATEMENTS)
    shared = property(lambda _: compiled, lambda *_: None)
    with pytest.MonkeyPatch.context() as patched:
        for dialect in DIALECTS:
            # What is compiled is found by its dialect, among other things.
            patched.setattr(dialect, "__eq__", lambda one, other: type(one) is type(other))
            patched.setattr(dialect, "__hash__", lambda one: hash(type(one)))
            patched.setattr(dialect, "_type_memos", WeakKeyDictionary())
        patched.setattr(Engine, "_compiled_cache", shared, raising=False)
        yield
