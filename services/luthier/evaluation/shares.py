"""How an evaluation is dealt to several workers: in shares of whole batches, a pure function of arms and records."""

from __future__ import annotations

from collections.abc import Sequence

from luthier.worker.v1.task_pb2 import AnswerShare, ArmRows

ROWS_A_BATCH = 64
"""Records that an arm is asked together. A batch is never cut: the same batches give the same bits."""


def dealt(arm_ids: Sequence[str], num_records: int, most: int) -> list[AnswerShare]:
    """Return at most `most` shares, as alike in their batches as can be; none is empty.

    Batches are in the order of the arms and then of the records, and a share is a run of them: so it is of few arms,
    and of few base models where those of one base stand beside each other.
    """
    batches = [(arm_id, first) for arm_id in arm_ids for first in range(0, num_records, ROWS_A_BATCH)]
    count = min(most, len(batches))
    bounds = [len(batches) * number // count for number in range(count + 1)]
    return [
        _share(number, batches[bounds[number - 1] : bounds[number]], num_records)
        for number in range(1, count + 1)
    ]


def rows_of(share: AnswerShare, arm_id: str) -> range:
    """Return which records an arm is asked by a share; empty where it is asked none."""
    for one in share.rows:
        if one.arm_id == arm_id:
            return range(one.first_row, one.first_row + one.num_rows)
    return range(0)


def all_rows(share: AnswerShare) -> range:
    """Return the records from the first to the last of which an arm is asked by a share."""
    return range(
        min(one.first_row for one in share.rows), max(one.first_row + one.num_rows for one in share.rows)
    )


def num_answers(share: AnswerShare) -> int:
    """Return how many answers a share is."""
    return sum(one.num_rows for one in share.rows)


def _share(number: int, batches: Sequence[tuple[str, int]], num_records: int) -> AnswerShare:
    first_rows: dict[str, list[int]] = {}
    for arm_id, first in batches:
        first_rows.setdefault(arm_id, []).append(first)
    rows = [
        ArmRows(
            arm_id=arm_id,
            first_row=firsts[0],
            num_rows=min(firsts[-1] + ROWS_A_BATCH, num_records) - firsts[0],
        )
        for arm_id, firsts in first_rows.items()
    ]
    return AnswerShare(number=number, rows=rows)
