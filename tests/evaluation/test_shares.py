"""How an evaluation is dealt: every answer once, in whole batches, alike."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from luthier.evaluation.shares import ROWS_A_BATCH, all_rows, dealt, num_answers, rows_of
from luthier.worker.v1.task_pb2 import AnswerShare

CASES = {"num_arms": st.integers(1, 16), "num_records": st.integers(1, 2000), "most": st.integers(1, 64)}


def batches_of(share: AnswerShare, arm_ids: list[str]) -> list[tuple[str, int]]:
    return [(arm, first) for arm in arm_ids for first in rows_of(share, arm)[::ROWS_A_BATCH]]


@given(**CASES)
def test_dealt_has_every_answer_once_in_whole_batches(num_arms: int, num_records: int, most: int) -> None:
    arms = [f"a{number}" for number in range(num_arms)]
    shares = dealt(arms, num_records, most)
    every = [batch for share in shares for batch in batches_of(share, arms)]
    assert every == [(arm, first) for arm in arms for first in range(0, num_records, ROWS_A_BATCH)]
    assert sum(map(num_answers, shares)) == num_arms * num_records
    for share in shares:
        for one in share.rows:
            assert one.first_row % ROWS_A_BATCH == 0
            end = one.first_row + one.num_rows
            assert end % ROWS_A_BATCH == 0 or end == num_records


@given(**CASES)
def test_dealt_makes_shares_alike_and_none_empty(num_arms: int, num_records: int, most: int) -> None:
    arms = [f"a{number}" for number in range(num_arms)]
    shares = dealt(arms, num_records, most)
    sizes = [len(batches_of(share, arms)) for share in shares]
    assert len(sizes) == min(most, sum(sizes))
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1
    assert [share.number for share in shares] == list(range(1, len(shares) + 1))


def test_a_share_is_of_few_arms() -> None:
    first, second = dealt(["a", "b", "c"], 4 * ROWS_A_BATCH, 2)
    assert [(one.arm_id, one.first_row, one.num_rows) for one in first.rows] == [("a", 0, 256), ("b", 0, 128)]
    assert [(one.arm_id, one.first_row, one.num_rows) for one in second.rows] == [
        ("b", 128, 128),
        ("c", 0, 256),
    ]
    assert (all_rows(first), all_rows(second)) == (range(256), range(256))
    assert rows_of(first, "c") == range(0)
