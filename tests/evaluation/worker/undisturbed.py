"""Evaluations that nothing disturbs, each made once: what those are held against that are dealt, stopped or killed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.evaluation import shares
from luthier.v1.evaluation_pb2 import Evaluation


@dataclass(frozen=True, slots=True, kw_only=True)
class Undisturbed:
    """One that a single worker made in this process.

    Attributes:
        done: what it came to.
        rows: its predictions, byte by byte.
        texts: what was said, by row and arm.
    """

    done: Evaluation
    rows: Sequence[bytes]
    texts: Mapping[tuple[int, str], str]


_MADE: dict[tuple[int, str], Undisturbed] = {}


async def undisturbed(site: Any, **wanted: Any) -> Undisturbed:
    """Return what an evaluation says, of models of this session, asked in batches of the size of now.

    The first test of this process that asks for it makes it on its own site; what the others say on theirs must be the
    same.
    """
    key = shares.ROWS_A_BATCH, repr(wanted)
    if key not in _MADE:
        async with site.worker():
            done = await site.ended((await site.evaluate(**wanted)).name)
        assert done.state == Evaluation.STATE_SUCCEEDED, done.error
        rows, said = await rows_of(site, done.name), await texts(site, done.name)
        _MADE[key] = Undisturbed(done=done, rows=rows, texts=said)
    return _MADE[key]


async def assert_same(site: Any, left: Undisturbed, right: Evaluation) -> None:
    """Two evaluations have the same answers, byte by byte, scores and comparisons."""
    assert left.rows == await rows_of(site, right.name)
    assert _without_clock(left.done) == _without_clock(right)
    assert right.state == Evaluation.STATE_SUCCEEDED, right.error


async def rows_of(site: Any, name: str) -> Sequence[bytes]:
    """The predictions of an evaluation, byte by byte."""
    return [row.SerializeToString(deterministic=True) for row in await site.predictions(name)]


async def texts(site: Any, name: str) -> dict[tuple[int, str], str]:
    """What was said, by row and arm."""
    return {
        (one.row, answer.arm_id): answer.text
        for one in await site.predictions(name)
        for answer in one.answers
    }


def _without_clock(done: Evaluation) -> tuple[list[Any], list[Any]]:
    results = [type(result).FromString(result.SerializeToString()) for result in done.arm_results]
    for result in results:
        result.ClearField("duration_seconds")
        result.ClearField("tokens_per_second")
    return results, list(done.comparisons)
