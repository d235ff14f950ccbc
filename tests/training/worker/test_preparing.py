"""What comes before the first step says how far it is, however long it takes: who looks takes silence for a hang."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from tests.training.worker.conftest import Site, stop_after_a_checkpoint
from tests.training.worker.test_methods import pairs, preference, registered
from tests.training.worker.test_weights import ended

from luthier.training.worker import reference, steps, train
from luthier.v1.fine_tuning_job_pb2 import FullConfig
from luthier.work.paced import Paced

__all__ = ["pairs"]


async def preparations(site: Site, folder: Path) -> dict[str, list[tuple[int, int]]]:
    """How far each phase was told to be before the first step of a job that is compared with its start."""
    wanted = preference(num_epochs=1, micro_batch_tokens=48)
    wanted.full.CopyFrom(FullConfig())
    async with site.worker():
        await registered(site, folder)
        job = await ended(site, "one", wanted)
    found: dict[str, list[tuple[int, int]]] = {}
    async for event in site.watch(job.name):
        if event.HasField("metrics"):
            return found
        if event.HasField("progress"):
            told = event.progress
            found.setdefault(told.phase, []).append((told.completed, told.total))
    raise AssertionError("the job has made no step")


async def test_rows_that_are_read_and_scored_are_counted(
    pairs: Site, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (reference, train):
        monkeypatch.setattr(module, "Paced", partial(Paced, 0.0))
    found = await preparations(pairs, model_folder)
    # Seven rows come at a time.
    assert found["reading rows"] == [(0, 0), *((count, 0) for count in (*range(7, 60, 7), 60))]
    began, *scoring = found["scoring the reference"]
    assert began == (0, 0)
    assert {total for _, total in scoring} == {60}
    counts = [count for count, _ in scoring]
    assert counts[0] == 0
    assert counts == sorted(set(counts)), "each pass has rows"
    assert counts[-1] >= 48, "the last passes are of validation rows"
    assert len(counts) > 6


async def test_the_passes_of_a_first_step_say_that_it_goes_on(
    pairs: Site, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "Paced", partial(Paced, 0.0))
    found = (await preparations(pairs, model_folder))["training"]
    assert len(found) > 2, "as many passes has the first step, and one is told before them"
    assert set(found) == {(0, found[0][1])}


async def test_what_is_soon_over_is_told_once(pairs: Site, model_folder: Path) -> None:
    found = await preparations(pairs, model_folder)
    assert len(found["training"]) == 1
    assert found["reading rows"] == found["scoring the reference"] == [(0, 0)]


async def test_a_job_that_goes_on_says_that_it_loads_its_checkpoint(site: Site, model_folder: Path) -> None:
    async with site.worker():
        await registered(site, model_folder)
    job = await site.create("one")
    await stop_after_a_checkpoint(site, job.name)
    async with site.worker():
        assert (await site.ended(job.name)).num_attempts == 2
    told: dict[int, list[tuple[int, int]]] = {1: [], 2: []}
    async for event in site.watch(job.name):
        if event.progress.phase == "loading checkpoint":
            told[event.attempt].append((event.progress.completed, event.progress.total))
    assert told[1] == []
    assert len(told[2]) > 1
    assert told[2] == [(number, len(told[2])) for number in range(len(told[2]))]
