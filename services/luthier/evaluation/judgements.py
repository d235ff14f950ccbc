"""How many judgements a judge is asked for, as it is known before any answer is there."""

from __future__ import annotations

from luthier.v1.judge_pb2 import Judge


def judgements_a_record(judge: Judge, num_arms: int) -> int:
    """Return how many judgements of a record there are at most, all arms having answered it.

    Of a pairwise judge two, one in each order, for each arm beside the one that is held against them.
    """
    return 2 * (num_arms - 1) if judge.HasField("pairwise") else num_arms
