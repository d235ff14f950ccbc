"""Rows of a rendering: whoever waits for them hears that nobody wants them any more."""

from __future__ import annotations

import time

import pytest

from luthier.errors import Cancelled
from luthier.training.worker.rows import read_corpus
from luthier.work.peers import channel


def test_reading_from_a_service_that_is_away_is_given_up_within_a_second() -> None:
    stop_at = time.monotonic() + 2.0

    def check() -> None:
        if time.monotonic() > stop_at:
            raise Cancelled("nobody wants it")

    with channel("127.0.0.1:1") as opened, pytest.raises(Cancelled):
        read_corpus(opened, lambda: "token", "projects/p/renderings/r", "digest", check)
    assert time.monotonic() - stop_at < 1.0
