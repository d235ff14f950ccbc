"""The measured table of `linear_cross_entropy`: which implementation `auto` takes."""

import functools
import json
import logging
from pathlib import Path

TABLE_PATH = Path(__file__).with_name("table.json")

_log = logging.getLogger(__name__)


def shape_class(num_rows: int, vocab: int) -> str:
    """The class of a problem: few or many labelled rows, small or large vocabulary."""
    return f"{'few' if num_rows < 128 else 'many'}_rows-{'small' if vocab < 8192 else 'large'}_vocab"


def key(isa: str, dtype: str, num_rows: int, vocab: int) -> str:
    """The table's key of a problem."""
    return f"{isa}/{dtype}/{shape_class(num_rows, vocab)}"


@functools.cache
def entries() -> dict[str, str]:
    """The committed table: key -> cpu or eager."""
    table: dict[str, str] = json.loads(TABLE_PATH.read_text())
    return table


@functools.cache
def choose(table_key: str) -> str:
    """The measured best implementation; eager, with one log line, where nothing was measured."""
    if table_key not in entries():
        _log.warning("linear_cross_entropy has no measurement for %s: running eager", table_key)
    return entries().get(table_key, "eager")
