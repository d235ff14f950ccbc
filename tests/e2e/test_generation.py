"""Interactive generation beside a running evaluation, and its prompt end when the caller goes away."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
from tests.e2e.conftest import WAIT, Shared

from luthier.errors import Unavailable
from luthier.v1.chat_pb2 import ChatMessage
from luthier.v1.evaluation_pb2 import Evaluation, EvaluationArm

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("checked_in_the_end")]
HELLO = [ChatMessage(role="user", content="colour of thing 3?")]


def test_generation_is_answered_while_an_evaluation_runs_and_stops_when_nobody_listens(
    whole: Shared,
) -> None:
    with whole.cluster.client() as client:
        version = client.renderings.get(whole.rendering).dataset_version
        list(client.generate("tiny", HELLO, max_new_tokens=2))  # the model is loaded
        arms = [EvaluationArm(arm_id=f"arm-{number}", model="tiny") for number in range(8)]
        wanted = Evaluation(dataset_version=version, arms=arms, max_new_tokens=400)
        running = client.evaluations.create(wanted)
        for event in client.evaluations.watch(running.name):
            if event.state_change.state == "RUNNING":
                break

        pieces = list(client.generate("tiny", HELLO, max_new_tokens=6))
        assert pieces[-1].finish_reason
        state = client.evaluations.get(running.name).state
        assert state == Evaluation.STATE_RUNNING, "the answer came while the evaluation ran"

        # More abandoned generations than the worker has slots: they can only all begin if each ends at once.
        began = time.monotonic()
        for _ in range(6):
            stream = client.generate("tiny", HELLO, max_new_tokens=400, temperature=1.0)
            next(iter(stream))
            stream.close()
        assert list(client.generate("tiny", HELLO, max_new_tokens=2))[-1].finish_reason
        assert time.monotonic() - began < 30

        client.evaluations.cancel(running.name)
        events = list(client.evaluations.watch(running.name))
        assert events[-1].state_change.state in {"CANCELLED", "SUCCEEDED"}


def test_the_same_seed_says_the_same_and_another_does_not(whole: Shared) -> None:
    with whole.cluster.client() as client:

        def say(seed: int) -> str:
            pieces = client.generate("tiny", HELLO, max_new_tokens=24, temperature=1.0, seed=seed)
            return "".join(piece.text for piece in pieces)

        first = say(1)
        assert say(1) == first
        assert say(2) != first


def engines(worker: int) -> list[int]:
    """The processes in which a worker has base models, or lets one wait for the next."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (path / "stat").read_text().rpartition(")")[2].split()
            holds = b"luthier.evaluation.worker.child" in (path / "cmdline").read_bytes()
            # What they are forked from holds none.
            holds = holds and (path / "comm").read_text().strip() != "luthier-nursery"
            if int(words[1]) == worker and holds and words[0] != "Z":
                found.append(int(path.name))
    return found


def test_a_killed_model_process_cuts_off_a_call_and_neither_its_worker_nor_an_evaluation(
    whole: Shared,
) -> None:
    worker = whole.cluster.pid("evaluation-worker")
    with whole.cluster.client() as client:
        list(client.generate("tiny", HELLO, max_new_tokens=2))  # the model is loaded
        (engine,) = engines(worker)
        version = client.renderings.get(whole.rendering).dataset_version
        arms = [EvaluationArm(arm_id=f"arm-{number}", model="tiny") for number in range(4)]
        running = client.evaluations.create(
            Evaluation(dataset_version=version, arms=arms, max_new_tokens=300)
        )
        for event in client.evaluations.watch(running.name):
            if event.progress.total:
                break
        assert engines(worker) == [engine], "it is shared"
        stream = client.generate("tiny", HELLO, max_new_tokens=400, temperature=1.0)
        next(iter(stream))
        os.kill(engine, signal.SIGKILL)
        with pytest.raises(Unavailable, match="was ended by SIGKILL") as caught:
            list(stream)
        assert (caught.value.reason, caught.value.retry_after_seconds) == ("CRASHED", 1.0)
        assert list(client.generate("tiny", HELLO, max_new_tokens=2))[-1].finish_reason
        done = client.evaluations.wait(running.name, timeout_seconds=WAIT)
    assert done.state == Evaluation.STATE_SUCCEEDED
    assert engine not in engines(worker)
    os.kill(worker, 0)
