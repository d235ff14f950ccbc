"""A home of former times, and services that run on one."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.golden.making import RestingCluster

HOME = Path(__file__).parent / "homes" / "2026-11-28-9e0ed6d"
SERVICES = ("data", "training", "evaluation")
SOON_SECONDS = 120.0


@contextlib.contextmanager
def running(cluster: RestingCluster) -> Iterator[RestingCluster]:
    try:
        cluster.start(*SERVICES)
        yield cluster
    finally:
        cluster.stop()


@contextlib.contextmanager
def opened(home: Path, service: str) -> Iterator[sqlite3.Connection]:
    database = f"file:{home / service / service}.db?mode=ro"
    with contextlib.closing(sqlite3.connect(database, uri=True)) as connection:
        yield connection


def soon(done: Callable[[], bool], told: Callable[[], Any] = lambda: None) -> None:
    deadline = time.monotonic() + SOON_SECONDS
    while not done():
        assert time.monotonic() < deadline, f"not within {SOON_SECONDS:g} s: {told()}"
        time.sleep(0.2)
