"""What the lines of a long call say of how far it is."""

from __future__ import annotations

import pytest

from luthier.client.cli.live import EventSummary
from luthier.v1.event_pb2 import Event, Progress


@pytest.mark.parametrize(
    ("progress", "position"),
    [
        (Progress(phase="loading", unit="arms"), "loading"),
        (Progress(phase="training", completed=12, total=41, unit="steps"), "training 12/41 steps"),
        (Progress(phase="training", total=41, unit="steps"), "training 0/41 steps"),
        (Progress(phase="reading rows", completed=300, unit="rows"), "reading rows 300 rows"),
    ],
)
def test_a_position_counts_only_what_can_be_counted(progress: Progress, position: str) -> None:
    summary = EventSummary()
    summary.take(Event(progress=progress))
    assert summary.position() == position
