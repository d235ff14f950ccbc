"""How much memory is left, as the kernel says it, and what fits into it."""

from __future__ import annotations

import pytest

from luthier.evaluation.worker import room
from luthier.evaluation.worker.room import fits_in_memory, memory_is_short

GIB = 1 << 30


def test_into_a_machine_that_says_nothing_nothing_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "available_bytes", lambda: None)
    assert not fits_in_memory(1, 0)
    assert not memory_is_short()


@pytest.mark.parametrize(("left", "is_short"), [(0, True), (1 << 20, True), (4 * GIB, False)])
def test_memory_is_short_where_little_is_left(
    left: int, *, is_short: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "available_bytes", lambda: left)
    assert memory_is_short() is is_short


@pytest.mark.parametrize(
    ("needed", "held", "fits"),
    [(1, 0, True), (3, 5, True), (3, 6, False), (6, 0, True), (7, 0, False), (100, 0, False)],
)
def test_a_model_fits_with_its_caches_beside_the_weights_of_others(
    needed: int, held: int, *, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "available_bytes", lambda: 10 * GIB)
    assert fits_in_memory(needed * GIB, held * GIB) is fits
