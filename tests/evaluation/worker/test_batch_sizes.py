"""What arms say, and what they find of given texts, does not depend on which records they are asked together.

Nor on the order of arms and the number of workers, which `test_dealt` and `test_several_bases` hold.
"""

from __future__ import annotations

from typing import Any

import pytest
from tests.evaluation.worker.test_given_texts import COLOURS, asked, metric, pair

from luthier.evaluation import shares
from luthier.text.records import ChatRecord, Message
from luthier.v1.evaluation_pb2 import Evaluation, Prediction

ARMS = [("zero", "base", 0), ("few", "base", 2), ("tuned", "tuned", 0)]
SIZES = (1, 3, 5, 64)
"""Of 12 records: each alone, batches that come out even, a last one that does not, and all together."""


async def run(
    site: Any, monkeypatch: pytest.MonkeyPatch, size: int, *names: str
) -> tuple[Evaluation, list[Prediction]]:
    monkeypatch.setattr(shares, "ROWS_A_BATCH", size)
    made = await site.evaluate(arms=ARMS, metrics=[metric(name) for name in names], max_new_tokens=12)
    async with site.worker():
        done: Evaluation = await site.ended(made.name)
    assert done.state == Evaluation.STATE_SUCCEEDED, done.error
    return done, await site.predictions(done.name)


def scores(done: Evaluation) -> dict[tuple[str, str], tuple[float, float, float]]:
    return {
        (arm.arm_id, one.score): (one.value, one.lower, one.upper)
        for arm in done.arm_results
        for one in arm.scores
    }


def of_rows(found: list[Prediction]) -> dict[tuple[int, str], dict[str, float]]:
    return {(row.row, answer.arm_id): dict(answer.scores) for row in found for answer in row.answers}


def questions(*numbers: int) -> list[ChatRecord]:
    """Questions of many lengths, the same one for a number."""
    return [
        ChatRecord(
            messages=(
                Message(role="user", content=f"what colour has thing {number}{', please' * (number % 5)}?"),
                Message(role="assistant", content=COLOURS[number % 3]),
            )
        )
        for number in numbers
    ]


async def test_answers_are_the_same_however_many_records_are_asked_together(
    site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.data.records["TEST"] = questions(*range(12))
    names = "EXACT_MATCH", "ANSWER_LENGTH", "PERPLEXITY"
    (first, said), *others = [await run(site, monkeypatch, size, *names) for size in SIZES]
    texts = {(row.row, answer.arm_id): answer.text for row in said for answer in row.answers}
    assert len(set(texts.values())) > len(texts) // 2, "the test says something"
    for done, found in others:
        assert found == said
        assert scores(done) == scores(first)
        assert list(done.comparisons) == list(first.comparisons)
    order = [7, 2, 11, 0, 5, 3, 9, 1, 10, 4, 8, 6]
    site.data.records["TEST"] = questions(*order)
    _, mixed = await run(site, monkeypatch, 5, *names)
    assert {(order[row.row], answer.arm_id): answer.text for row in mixed for answer in row.answers} == texts


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("chats", ("PERPLEXITY", "MULTIPLE_CHOICE", "PROMPT_TOKENS")),
        ("pairs", ("PREFERENCE", "BITS_PER_BYTE", "PERPLEXITY")),
    ],
)
async def test_how_likely_texts_are_has_the_same_bits_however_many_records_are_asked_together(
    site: Any, monkeypatch: pytest.MonkeyPatch, kind: str, names: tuple[str, ...]
) -> None:
    site.data.records["TEST"] = [
        pair(number) if kind == "pairs" else asked(number, COLOURS[number % 3]) for number in range(12)
    ]
    (first, said), *others = [await run(site, monkeypatch, size, *names) for size in SIZES]
    assert len({value for value, _, _ in scores(first).values()}) > len(ARMS), "the test says something"
    for done, found in others:
        assert of_rows(found) == of_rows(said)
        assert scores(done) == scores(first)
        assert list(done.comparisons) == list(first.comparisons)
