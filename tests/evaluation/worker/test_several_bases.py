"""Arms over different base models: one is loaded at a time, and nothing depends on order, batches or workers."""

from __future__ import annotations

import asyncio
import signal
from contextlib import AsyncExitStack
from typing import Any, ClassVar

import pytest
from tests.evaluation.conftest import Site
from tests.evaluation.here import Here
from tests.evaluation.worker.test_resume import (
    ROWS,
    committed,
    counted,
    process,
    progress,
    until_answered,
)
from tests.evaluation.worker.undisturbed import assert_same, texts, undisturbed

from luthier.errors import InvalidArgument
from luthier.evaluation import shares
from luthier.evaluation.worker.order import LoadOrder
from luthier.v1 import evaluation_pb2
from luthier.v1.evaluation_pb2 import EVALUATION_METRIC_EXACT_MATCH, EVALUATION_METRIC_PERPLEXITY

# Arms of one base do not stand beside each other.
ARMS = [("zero", "base", 0), ("far", "other", 0), ("tuned", "tuned", 0), ("far-few", "other", 2)]
WANTED: dict[str, Any] = {
    "arms": ARMS,
    "metrics": [EVALUATION_METRIC_EXACT_MATCH, EVALUATION_METRIC_PERPLEXITY],
    "max_new_tokens": 16,
}
EVERY = {(one, row) for one, _, _ in ARMS for row in range(12)}


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "ROWS_A_BATCH", ROWS)


class Counting(Here):
    """Notes how many base models are there."""

    started: ClassVar[int] = 0
    there: ClassVar[int] = 0
    most: ClassVar[int] = 0

    def __init__(self, order: LoadOrder) -> None:
        super().__init__(order)
        Counting.started += 1
        Counting.there += 1
        Counting.most = max(Counting.most, Counting.there)

    def close(self) -> None:
        super().close()
        Counting.there -= 1


@pytest.fixture
def _counting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("started", "there", "most"):
        monkeypatch.setattr(Counting, name, 0)


async def run(site: Any, **fields: Any) -> evaluation_pb2.Evaluation:
    async with site.worker():
        done: evaluation_pb2.Evaluation = await site.ended((await site.evaluate(**{**WANTED, **fields})).name)
    assert done.state == evaluation_pb2.Evaluation.STATE_SUCCEEDED, done.error
    return done


@pytest.mark.usefixtures("_counting")
async def test_each_base_is_loaded_once_and_none_beside_another(site: Any) -> None:
    async with site.worker(Counting):
        done = await site.ended((await site.evaluate(**WANTED)).name)
    assert done.state == evaluation_pb2.Evaluation.STATE_SUCCEEDED, done.error
    assert (Counting.started, Counting.most, Counting.there) == (2, 1, 0)
    assert [arm.base_model.rsplit("/", 1)[-1] for arm in done.arms] == ["base", "other", "base", "other"]
    assert [result.arm_id for result in done.arm_results] == [arm.arm_id for arm in done.arms]
    assert set(done.model_digests) == {f"{site.PARENT}/models/{name}" for name in ("base", "other", "tuned")}


async def test_each_arm_says_what_it_says_alone_whatever_the_order(site: Any) -> None:
    together = (await undisturbed(site, **WANTED)).texts
    turned = await run(site, arms=ARMS[::-1])
    assert [result.arm_id for result in turned.arm_results] == [one for one, _, _ in ARMS[::-1]]
    assert await texts(site, turned.name) == together
    for arm in ARMS:
        alone = await texts(site, (await run(site, arms=[arm])).name)
        assert alone == {key: text for key, text in together.items() if key[1] == arm[0]}
    said = [{row: text for (row, one), text in together.items() if one == arm} for arm in ("zero", "far")]
    assert said[0] != said[1], "the models are not the same"


async def test_scores_do_not_depend_on_the_order_of_arms(site: Any) -> None:
    one, other = (await undisturbed(site, **WANTED)).done, await run(site, arms=ARMS[::-1])
    scores = [{arm.arm_id: list(arm.scores) for arm in done.arm_results} for done in (one, other)]
    assert scores[0] == scores[1]
    assert {len(found) for found in scores[0].values()} == {2}, "perplexity too: all have one tokenizer"


@pytest.mark.parametrize("num_workers", [1, 2])
async def test_dealt_to_workers_it_is_the_same(
    site: Any, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    by_one = await undisturbed(site, **WANTED)
    with counted(monkeypatch) as asked:
        async with AsyncExitStack() as stack:
            for number in range(num_workers):
                await stack.enter_async_context(site.worker(name=f"-{number}"))
            done = await site.ended((await site.evaluate(**WANTED, max_workers=5)).name)
    await assert_same(site, by_one, done)
    assert len(asked) == len(EVERY)
    assert set(asked) == EVERY


async def test_a_worker_that_stops_between_bases_leaves_its_answers_to_the_next(
    site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = await undisturbed(site, **WANTED)
    with counted(monkeypatch) as first:
        async with site.worker():
            made = await site.evaluate(**WANTED)
            await until_answered(site, made.name, 26)
    with counted(monkeypatch) as second:
        async with site.worker():
            done = await site.ended(made.name)
    await assert_same(site, alone, done)
    assert {arm for arm, _ in first} >= {"zero", "tuned", "far"}
    assert len(set(second)) == len(second)
    assert len(set(first) & set(second)) <= ROWS, "at most the batch that was cut off is asked again"
    assert set(first) | set(second) == EVERY


@pytest.mark.long
@pytest.mark.e2e
async def test_a_worker_that_is_killed_changes_nothing_and_asks_nothing_again(site: Site) -> None:
    alone = await undisturbed(site, **WANTED)
    with process(site) as worker:
        made = await site.evaluate(**WANTED)
        await until_answered(site, made.name, 28)
        worker.send_signal(signal.SIGKILL)
        await asyncio.to_thread(worker.wait)
    kept = committed(site)
    assert 24 < kept < 48
    with process(site):
        done = await site.ended(made.name)
    await assert_same(site, alone, done)
    second = [completed for attempt, completed in await progress(site, made.name) if attempt == 2]
    assert second == list(range(kept + 1, 49)), "each answer that was not kept is asked once, no other is"


async def test_perplexities_of_different_tokenizers_are_refused_with_what_would_be_right(site: Any) -> None:
    site.models.tokenizers = {"other": "t" * 64}
    with pytest.raises(InvalidArgument) as caught:
        await site.evaluate(**WANTED)
    assert caught.value.message.startswith("evaluation.metrics: must not have PERPLEXITY")
    assert (
        f"got zero: {site.PARENT}/models/base; far: {site.PARENT}/models/other; measure BITS_PER_BYTE in its place"
        in caught.value.message
    )
    done = await run(site, metrics=[EVALUATION_METRIC_EXACT_MATCH])
    assert [len(result.scores) for result in done.arm_results] == [1, 1, 1, 1]
