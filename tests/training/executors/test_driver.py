"""A driver of ranks that is killed: nothing that it started goes on."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest
from tests.training.executors.test_torchrun import is_running, ranks_of, wanted
from tests.training.worker.conftest import Site
from tests.training.worker.real_worker import real_worker

from luthier.work.machine import num_cores


@pytest.mark.long
@pytest.mark.e2e
@pytest.mark.skipif(num_cores() < 2, reason="a worker takes at most as many ranks as there are processors")
async def test_no_rank_outlives_a_driver_that_is_killed_by_a_second(site: Site, model_folder: Path) -> None:
    """One of them is stopped, so that it sees neither the end of its line nor that the other is gone."""
    with real_worker(site, "wide", "--executor", "torchrun", "--ranks", "2") as driver:
        site.data.tokenizer_digest = (await site.register(model_folder)).tokenizer_digest
        job = await site.create_job("long", wanted(num_epochs=10_000))
        async for event in site.watch(job.name):
            if event.HasField("metrics") and event.step >= 3:
                break
        ranks = ranks_of(site)
        assert len(ranks) == 2
        assert all(map(is_running, ranks))
        os.kill(ranks[1], signal.SIGSTOP)
        driver.kill()
        killed_at = time.monotonic()
        while any(map(is_running, ranks)):
            assert time.monotonic() - killed_at < 1.0
            await asyncio.sleep(0.02)
