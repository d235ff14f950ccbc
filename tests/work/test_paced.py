"""What is done now and then."""

from __future__ import annotations

from luthier.work.paced import REPORT_SECONDS, Paced


def test_due_comes_once_in_so_many_seconds_however_often_it_is_asked() -> None:
    now = 100.0
    paced = Paced(clock=lambda: now)
    found = []
    for tenth in range(350):
        now = 100.0 + tenth / 10
        if paced.due():
            found.append(now)
    assert found == [100.0 + REPORT_SECONDS * number for number in (1, 2, 3)]


def test_due_is_not_made_up_for_after_a_long_pause() -> None:
    now = 0.0
    paced = Paced(5.0, lambda: now)
    now = 61.0
    assert paced.due()
    assert not paced.due(), "twelve times in a row would say no more than once"
    now = 66.0
    assert paced.due()
