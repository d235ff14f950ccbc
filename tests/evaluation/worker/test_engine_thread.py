"""The engine's thread: many askers at once, each gets its own; what ends, fails or stops ends for one alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.evaluation.here import Here

from luthier.errors import (
    AlreadyExists,
    Cancelled,
    Internal,
    InvalidArgument,
    LuthierError,
    NotFound,
    Reason,
    ResourceExhausted,
    Unavailable,
)
from luthier.evaluation.worker import computing
from luthier.evaluation.worker.engine import EngineClient
from luthier.evaluation.worker.order import LoadOrder, Measured
from luthier.lm import engine as engine_module
from luthier.lm.adapter_files import load_adapter
from luthier.lm.generate import GenerationRequest
from luthier.lm.lora import remove_adapter

LONG = 900


def request(name: str, prompt: int = 5, count: int = 16, adapter: str | None = None) -> GenerationRequest:
    return GenerationRequest(
        request_id=name, prompts=((prompt, prompt + 1, prompt + 2),), max_new_tokens=count, adapter=adapter
    )


def tokens(client: EngineClient, wanted: GenerationRequest) -> list[int]:
    return [token for event in client.generate(wanted) for token in event.token_ids]


class Running:
    """An engine in its thread."""

    def __init__(self, folder: Path) -> None:
        self.here = Here(LoadOrder(folder=folder))
        self.here.begun()
        self.model = self.here.computing.model
        self.engine = self.here.computing.engine
        self.client = EngineClient(self.here)

    def until_idle(self) -> None:
        deadline = time.monotonic() + 10
        while self.engine.running():
            assert time.monotonic() < deadline, self.engine.running()
            time.sleep(0.01)


@pytest.fixture
def running(model_folders: dict[str, Path]) -> Iterator[Running]:
    made = Running(model_folders["base"])
    yield made
    made.client.close()


def test_every_asker_among_many_gets_its_own_answer(running: Running) -> None:
    alone = [tokens(running.client, request(f"alone-{prompt}", prompt)) for prompt in range(5, 21)]
    with ThreadPoolExecutor(16) as threads:
        together = list(
            threads.map(
                lambda prompt: tokens(running.client, request(f"together-{prompt}", prompt)), range(5, 21)
            )
        )
    assert together == alone
    assert len({tuple(answer) for answer in alone}) > 8
    running.until_idle()


def test_an_id_that_runs_is_refused_and_its_owner_goes_on(running: Running) -> None:
    wanted = request("same", count=40)
    first = running.client.generate(wanted)
    said = list(next(first).token_ids)
    with pytest.raises(AlreadyExists, match="'same' is running"):
        next(running.client.generate(wanted))
    said += [token for event in first for token in event.token_ids]
    assert len(said) == 40


def test_a_check_that_raises_ends_the_request_without_waiting_for_an_event(running: Running) -> None:
    wanted = threading.Event()
    held = threading.Event()

    def check() -> None:
        if wanted.is_set():
            raise Cancelled("nobody listens")

    # Nothing is produced while the engine is held; the check must be heard all the same.
    with ThreadPoolExecutor(2) as threads:
        threads.submit(running.here.run, held.wait)
        asking = threads.submit(list, running.client.generate(request("r", count=LONG), check))
        wanted.set()
        try:
            with pytest.raises(Cancelled, match="nobody listens"):
                asking.result(timeout=5)
        finally:
            held.set()
    running.until_idle()


def test_closing_the_iterator_cancels_the_request(running: Running) -> None:
    events = running.client.generate(request("r", count=LONG))
    next(events)
    events.close()
    running.until_idle()


def test_a_request_that_does_not_fit_leaves_nothing_behind(running: Running) -> None:
    for _ in range(2):
        with pytest.raises(InvalidArgument, match="context of 1024 tokens"):
            next(running.client.generate(request("r", count=2000)))
    assert len(tokens(running.client, request("r"))) == 16


def test_a_request_that_fails_in_the_engine_fails_alone(
    running: Running, model_folders: dict[str, Path]
) -> None:
    expected = tokens(running.client, request("expected", count=60))
    running.here.run(lambda: load_adapter(running.model, model_folders["tuned"], "a"))
    failing = running.client.generate(request("failing", count=LONG, adapter="a"))
    next(failing)
    with ThreadPoolExecutor(1) as threads:
        going_on = threads.submit(tokens, running.client, request("going-on", count=60))
        running.here.run(lambda: remove_adapter(running.model, "a"))
        with pytest.raises(NotFound, match="no adapter 'a'"):
            list(failing)
        assert going_on.result(timeout=10) == expected


def test_what_is_done_between_two_steps_returns_and_raises_what_the_work_does(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = Measured(adapter=None, sequences=[[5, 6, 7]], masks=[[False, True, True]])
    (score,) = running.client.measure(wanted)
    assert (score.num_tokens, score.logprob < 0) == (2, True)
    with pytest.raises(InvalidArgument, match="one mask for each sequence, got 0 for 1"):
        running.client.measure(replace(wanted, masks=[]))

    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError(threading.current_thread().name)

    monkeypatch.setattr(computing, "sequence_logprobs", fail)
    with pytest.raises(Internal, match="ZeroDivisionError: engine"):
        running.client.measure(wanted)


STICKY = "CUDA error: an illegal memory access was encountered\nCompile with"
ON_A_GPU = torch.device("cuda", 1)


def measured(client: EngineClient) -> object:
    return client.measure(Measured(adapter=None, sequences=[[5, 6]], masks=[[False, True]]))


@pytest.mark.parametrize("ask", [measured, lambda client: tokens(client, request("r"))], ids=["work", "step"])
def test_a_device_that_fails_is_said_and_then_nothing_more_is_answered(
    running: Running, monkeypatch: pytest.MonkeyPatch, ask: Callable[[EngineClient], object]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError(STICKY)

    monkeypatch.setattr(computing, "sequence_logprobs", fail)
    monkeypatch.setattr(engine_module, "Batch", fail)
    monkeypatch.setattr(type(running.model), "device", ON_A_GPU)
    with pytest.raises(
        Unavailable, match="cuda:1 must work, it failed: CUDA error: an illegal memory access"
    ) as caught:
        ask(running.client)
    assert caught.value.reason == Reason.CRASHED
    deadline = time.monotonic() + 10
    while running.client.ended is None:
        assert time.monotonic() < deadline, "the next who asks gets another process"
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("device", "error", "kind", "reason"),
    [
        (ON_A_GPU, RuntimeError("CUDA error: out of memory"), ResourceExhausted, Reason.OUT_OF_MEMORY),
        (
            ON_A_GPU,
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            ResourceExhausted,
            Reason.OUT_OF_MEMORY,
        ),
        (ON_A_GPU, RuntimeError(STICKY), Unavailable, Reason.CRASHED),
        (torch.device("cpu"), RuntimeError(STICKY), Internal, Reason.INTERNAL),
        (ON_A_GPU, ValueError(STICKY), Internal, Reason.INTERNAL),
    ],
)
def test_an_error_of_memory_or_of_a_device_has_its_reason(
    device: torch.device, error: Exception, kind: type[LuthierError], reason: Reason
) -> None:
    said = computing.told(error, device)
    assert type(said) is kind
    assert said.reason == reason


def test_nobody_waits_for_a_thread_that_has_stopped(running: Running) -> None:
    with ThreadPoolExecutor(1) as threads:
        events = running.client.generate(request("r", count=LONG))
        next(events)
        asking = threads.submit(list, events)
        running.client.close()
        with pytest.raises(Unavailable, match="being taken out of memory"):
            asking.result(timeout=5)
    with pytest.raises(Unavailable, match="being taken out of memory"):
        running.client.unfit([])
