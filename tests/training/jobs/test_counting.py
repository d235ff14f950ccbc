"""A survey made in another process is the survey, and does not hold up the loop that waits for it."""

from __future__ import annotations

import asyncio
import resource
import time
from typing import Any

import pytest

from luthier.training.jobs import counting
from luthier.training.jobs.counting import MOST_IN_A_THREAD, estimate_warnings, survey_elsewhere
from luthier.training.recipes.batches import BatchSettings, RowLength
from luthier.training.recipes.estimate import quick_survey
from luthier.training.recipes.survey import PackedLengths, survey


def batches(**changes: int) -> BatchSettings:
    settings = {
        "seed": 3,
        "num_epochs": 2,
        "max_steps": 0,
        "batch_tokens": 64,
        "batch_rows": 0,
        "micro_batch_tokens": 32,
    }
    return BatchSettings(**{**settings, **changes})


def rows(count: int, first: int = 0, supervised: int = 2) -> PackedLengths:
    return PackedLengths.of(
        RowLength(row=row, num_tokens=3 + row * 7 % 20, num_supervised=supervised)
        for row in range(first, first + count)
    )


def pairs(count: int, first: int = 0) -> PackedLengths:
    """Units of two rows of 8 to 15 tokens, of which the second alone teaches."""
    return PackedLengths.of(
        RowLength(row=row, num_tokens=8 + row * 3 % 8, num_supervised=row % 2 * 2, unit=row - row % 2)
        for row in range(first, first + 2 * count)
    )


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The arguments of processes that are started meanwhile."""
    found: list[str] = []
    start = asyncio.create_subprocess_exec

    async def noted(*arguments: str, **options: Any) -> asyncio.subprocess.Process:
        found.append(" ".join(arguments))
        return await start(*arguments, **options)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", noted)
    return found


@pytest.mark.parametrize("where", ["a thread", "a process"])
@pytest.mark.parametrize(
    ("train", "validation", "settings", "answer_tokens"),
    [
        (rows(50), rows(9, first=50), batches(), 0),
        (rows(50), rows(0), batches(batch_tokens=0, batch_rows=4, max_steps=7), 0),
        (rows(50, supervised=0), rows(3, first=50), batches(), 0),
        (rows(50), rows(3, first=50), batches(micro_batch_tokens=10), 0),
        (rows(0), rows(0), batches(), 0),
        (pairs(20), pairs(4, first=40), batches(), 0),
        (pairs(20), pairs(4, first=40), batches(micro_batch_tokens=24), 0),
        (pairs(20), pairs(4, first=40), batches(batch_tokens=24), 0),
        (rows(50), rows(9, first=50), batches(), 3),
    ],
    ids=[
        "by tokens",
        "by rows",
        "nothing teaches",
        "too long",
        "no rows",
        "pairs",
        "a pair too long for a pass",
        "a pair too long for a step",
        "prompts",
    ],
)
async def test_survey_elsewhere_is_survey(
    train: PackedLengths,
    validation: PackedLengths,
    settings: BatchSettings,
    answer_tokens: int,
    where: str,
    started: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if where == "a process":
        monkeypatch.setattr(counting, "MOST_IN_A_THREAD", -1)
    found = await survey_elsewhere(train, validation, settings, answer_tokens)
    assert len(started) == (where == "a process")
    if answer_tokens:
        train, validation = train.with_answers(answer_tokens), validation.with_answers(answer_tokens)
    assert found == survey(train, validation, settings)


async def test_few_rows_that_pass_are_counted_in_a_thread(started: list[str]) -> None:
    """However they pass: rows of both splits, in each epoch."""
    most = MOST_IN_A_THREAD // 2
    await survey_elsewhere(rows(most - 9), rows(9, first=most), batches(num_epochs=2))
    assert not started
    await survey_elsewhere(rows(most), rows(9, first=most), batches(num_epochs=2))
    assert len(started) == 1


@pytest.mark.parametrize("train", [rows(1), rows(MOST_IN_A_THREAD)], ids=["one row", "many rows"])
async def test_what_a_thread_counts_takes_milliseconds(train: PackedLengths) -> None:
    """Of a processor, which a busy machine does not make more of: a thread takes turns with the loop."""
    epochs = MOST_IN_A_THREAD // len(train)
    took = []
    for _ in range(3):
        before = time.process_time()
        await survey_elsewhere(train, rows(0), batches(num_epochs=epochs))
        took.append(time.process_time() - before)
    assert min(took) < 0.1, took


async def test_survey_elsewhere_leaves_the_loop_free() -> None:
    """The loop's longest pause stays far below what counting takes."""
    longest, stop = 0.0, asyncio.Event()

    async def watch() -> None:
        nonlocal longest
        while not stop.is_set():
            before = time.perf_counter()
            await asyncio.sleep(0.001)
            longest = max(longest, time.perf_counter() - before)

    train = rows(60_000)
    watching = asyncio.create_task(watch())
    began = time.perf_counter()
    await survey_elsewhere(train, rows(0), batches(num_epochs=4))
    seconds = time.perf_counter() - began
    stop.set()
    await watching
    assert longest < seconds / 2


async def test_a_hundred_epochs_of_a_hundred_thousand_rows_are_planned_in_seconds() -> None:
    """In seconds of a processor, which a busy machine does not make more of; counting them all takes 40."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    settings = batches(num_epochs=100, batch_tokens=4096, micro_batch_tokens=2048)
    found = await survey_elsewhere(rows(100_000), rows(9, first=100_000), settings)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 12
    assert found.totals is not None
    assert found.totals.num_tokens == 100 * sum(rows(100_000).num_tokens)
    assert found.totals.num_counted_steps < found.totals.num_steps / 20
    (warning,) = estimate_warnings(found, 0)
    assert warning.startswith(
        f"{found.totals.num_steps} steps are an estimate from {found.totals.num_counted_steps} that were counted"
    )


async def test_what_was_counted_is_no_estimate() -> None:
    assert list(estimate_warnings(await survey_elsewhere(rows(50), rows(0), batches()), 0)) == []


def test_steps_that_the_most_of_them_end_are_no_estimate_but_what_they_come_to() -> None:
    found = quick_survey(rows(2000), rows(0), batches(max_steps=2), most_counted=500)
    assert found.totals is not None
    (warning,) = estimate_warnings(found, 2)
    assert warning.startswith(
        f"what 2 steps come to is an estimate from {found.totals.num_counted_steps} that were counted, as putting"
    )


async def test_survey_elsewhere_ends_its_process_when_nobody_waits_any_more() -> None:
    work = asyncio.create_task(survey_elsewhere(rows(200_000), rows(0), batches(num_epochs=50)))
    await asyncio.sleep(0.3)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(work, 5)
