"""An evaluation whose worker goes away is finished by the next one, which asks nothing again that was answered."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from tests.evaluation.worker.undisturbed import assert_same, texts, undisturbed
from tests.stores import service_file

from luthier.client.partial_answers import partial_words
from luthier.evaluation import shares
from luthier.evaluation.worker.engine import EngineClient
from luthier.lm.generate import GenerationRequest
from luthier.v1 import evaluation_pb2, evaluation_service_pb2

ROWS = 3
WANTED: dict[str, Any] = {
    "arms": [("zero", "base", 0), ("few", "base", 2), ("tuned", "tuned", 0)],
    "metrics": [evaluation_pb2.EVALUATION_METRIC_EXACT_MATCH, evaluation_pb2.EVALUATION_METRIC_PERPLEXITY],
    # Long enough to be stopped among.
    "max_new_tokens": 48,
}
# The worker as it is, but with small batches that are committed at once: records enough to be killed among.
WORKER = """
import functools
from luthier.evaluation import shares
from luthier.evaluation.worker import __main__ as program
shares.ROWS_A_BATCH = 3
program.Evaluator = functools.partial(program.Evaluator, commit_seconds=0.0)
program.main()
"""


async def progress(site: Any, name: str) -> list[tuple[int, int]]:
    """Attempt and answers so far, of every event of an ended evaluation that tells them."""
    request = evaluation_service_pb2.WatchEvaluationRequest(name=name)
    events = [event async for event in site.stream("WatchEvaluation", request)]
    return [(event.attempt, event.progress.completed) for event in events if event.progress.total]


async def until_answered(site: Any, name: str, count: int) -> None:
    request = evaluation_service_pb2.WatchEvaluationRequest(name=name)
    async for event in site.stream("WatchEvaluation", request):
        if event.progress.total and event.progress.completed >= count:
            return
    raise AssertionError(f"{name} ended before {count} answers")


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "ROWS_A_BATCH", ROWS)


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int]]]:
    """Note the evaluation's prompts that are asked for in a block, by arm and row."""
    asked: list[tuple[str, int]] = []
    generate = EngineClient.generate

    def counting(client: EngineClient, request: GenerationRequest, *others: Any) -> Any:
        arm_id = request.request_id.split("/")[1]
        asked.extend((arm_id, request.first_row + index) for index in range(len(request.prompts)))
        return generate(client, request, *others)

    with monkeypatch.context() as patched:
        patched.setattr(EngineClient, "generate", counting)
        yield asked


@pytest.mark.usefixtures("small_batches")
async def test_a_worker_that_stops_leaves_its_answers_to_the_next(
    site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = await undisturbed(site, **WANTED)
    with counted(monkeypatch) as first:
        async with site.worker():
            made = await site.evaluate(**WANTED)
            await until_answered(site, made.name, 13)
    with counted(monkeypatch) as second:
        async with site.worker():
            done = await site.ended(made.name)
    await assert_same(site, alone, done)
    assert len(first) >= 12
    assert len(set(second)) == len(second)
    again = set(first) & set(second)
    assert len(again) <= ROWS, "at most the batch that was cut off is asked again"
    assert set(first) | set(second) == {(one, row) for one, _, _ in WANTED["arms"] for row in range(12)}


@pytest.mark.usefixtures("small_batches")
async def test_answers_before_a_cancel_are_kept(site: Any) -> None:
    whole = await undisturbed(site, **WANTED)
    async with site.worker():
        made = await site.evaluate(**WANTED)
        await until_answered(site, made.name, 13)
        await site.call("CancelEvaluation", evaluation_service_pb2.CancelEvaluationRequest(name=made.name))
        done = await site.ended(made.name)
    assert done.state == evaluation_pb2.Evaluation.STATE_CANCELLED
    assert done.num_records == whole.done.num_records
    assert not done.arm_results
    known = await texts(site, done.name)
    assert 12 <= len(known) < len(whole.texts)
    assert known.items() <= whole.texts.items()
    told = partial_words(done, await site.predictions(done.name))
    assert re.match(
        rf"CANCELLED\. \d+ of 36 answers had come, kept are those to {done.num_records} records", told
    )
    by_arm = Counter(arm_id for _, arm_id in known)
    assert all(f"{arm_id} {by_arm[arm_id]}" in told for arm_id, _, _ in WANTED["arms"])


def environment(site: Any, name: str = "") -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("LUTHIER_")}
    return clean | {
        "LUTHIER_HOME": str(site.home),
        "LUTHIER_DATA_ADDRESS": site.peers_address,
        "LUTHIER_TRAINING_ADDRESS": site.peers_address,
        "LUTHIER_EVALUATION_ADDRESS": site.address,
        "LUTHIER_WORKER_NUM_THREADS": "1",
        "LUTHIER_WORKER_NAME": name,
        "OMP_NUM_THREADS": "1",
    }


@contextmanager
def process(site: Any, name: str = "") -> Iterator[subprocess.Popen[bytes]]:
    """A real evaluation worker; what it said is told when the block fails."""
    path = site.home / "worker.log"
    with path.open("ab") as log:
        running = subprocess.Popen(
            [sys.executable, "-c", WORKER], env=environment(site, name), stdout=log, stderr=log
        )
    try:
        yield running
    except BaseException:
        print(f"the worker ended with {running.poll()} and said:", path.read_text()[-8000:], sep="\n")
        raise
    finally:
        running.kill()
        running.wait()


def committed(site: Any, share: int = 0) -> int:
    """Answers that the service keeps of the whole, or of a share."""
    with sqlite3.connect(service_file(site.home, "evaluation")) as database:
        kept = database.execute("select coalesce(max(step), 0) from answer_files where share = ?", (share,))
        return int(kept.fetchone()[0])


@pytest.mark.long
@pytest.mark.e2e
@pytest.mark.usefixtures("small_batches")
async def test_a_killed_worker_changes_nothing_and_asks_nothing_again(site: Any) -> None:
    alone = await undisturbed(site, **WANTED)
    with process(site) as worker:
        made = await site.evaluate(**WANTED)
        await until_answered(site, made.name, 14)
        worker.send_signal(signal.SIGKILL)
        await asyncio.to_thread(worker.wait)
    kept = committed(site)
    assert 12 <= kept < 36
    with process(site):
        done = await site.ended(made.name)
    await assert_same(site, alone, done)
    seen = await progress(site, made.name)
    assert max(completed for attempt, completed in seen if attempt == 1) >= 14
    second = [completed for attempt, completed in seen if attempt == 2]
    assert second == list(range(kept + 1, 37)), "each answer that was not kept is asked once, no other is"
    assert committed(site) == 0, "what the attempts kept goes with the end"
