"""The engine's thread: many askers at once, each gets its own; what ends, fails or stops ends for one alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from luthier.errors import AlreadyExists, Cancelled, InvalidArgument, NotFound, Unavailable
from luthier.evaluation.worker.engine_thread import EngineThread
from luthier.lm.adapter_files import load_adapter
from luthier.lm.engine import Engine
from luthier.lm.generate import GenerationRequest
from luthier.lm.load import load_model
from luthier.lm.lora import remove_adapter

LONG = 900


def request(name: str, prompt: int = 5, count: int = 16, adapter: str | None = None) -> GenerationRequest:
    return GenerationRequest(
        request_id=name, prompts=((prompt, prompt + 1, prompt + 2),), max_new_tokens=count, adapter=adapter
    )


def tokens(thread: EngineThread, wanted: GenerationRequest) -> list[int]:
    return [token for event in thread.generate(wanted) for token in event.token_ids]


class Running:
    """An engine in its thread."""

    def __init__(self, folder: Path) -> None:
        self.model = load_model(folder)
        self.engine = Engine(self.model)
        self.thread = EngineThread(self.engine)

    def until_idle(self) -> None:
        deadline = time.monotonic() + 10
        while self.engine.running():
            assert time.monotonic() < deadline, self.engine.running()
            time.sleep(0.01)


@pytest.fixture
def running(model_folders: dict[str, Path]) -> Iterator[Running]:
    made = Running(model_folders["base"])
    yield made
    made.thread.stop()


def test_every_asker_among_many_gets_its_own_answer(running: Running) -> None:
    alone = [tokens(running.thread, request(f"alone-{prompt}", prompt)) for prompt in range(5, 21)]
    with ThreadPoolExecutor(16) as threads:
        together = list(
            threads.map(
                lambda prompt: tokens(running.thread, request(f"together-{prompt}", prompt)), range(5, 21)
            )
        )
    assert together == alone
    assert len({tuple(answer) for answer in alone}) > 8
    running.until_idle()


def test_an_id_that_runs_is_refused_and_its_owner_goes_on(running: Running) -> None:
    wanted = request("same", count=40)
    first = running.thread.generate(wanted)
    said = list(next(first).token_ids)
    with pytest.raises(AlreadyExists, match="'same' is running"):
        next(running.thread.generate(wanted))
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
        threads.submit(running.thread.run, held.wait)
        asking = threads.submit(list, running.thread.generate(request("r", count=LONG), check))
        wanted.set()
        try:
            with pytest.raises(Cancelled, match="nobody listens"):
                asking.result(timeout=5)
        finally:
            held.set()
    running.until_idle()


def test_closing_the_iterator_cancels_the_request(running: Running) -> None:
    events = running.thread.generate(request("r", count=LONG))
    next(events)
    events.close()
    running.until_idle()


def test_a_request_that_does_not_fit_leaves_nothing_behind(running: Running) -> None:
    for _ in range(2):
        with pytest.raises(InvalidArgument, match="context of 1024 tokens"):
            next(running.thread.generate(request("r", count=2000)))
    assert len(tokens(running.thread, request("r"))) == 16


def test_a_request_that_fails_in_the_engine_fails_alone(
    running: Running, model_folders: dict[str, Path]
) -> None:
    expected = tokens(running.thread, request("expected", count=60))
    running.thread.run(lambda: load_adapter(running.model, model_folders["tuned"], "a"))
    failing = running.thread.generate(request("failing", count=LONG, adapter="a"))
    next(failing)
    with ThreadPoolExecutor(1) as threads:
        going_on = threads.submit(tokens, running.thread, request("going-on", count=60))
        running.thread.run(lambda: remove_adapter(running.model, "a"))
        with pytest.raises(NotFound, match="no adapter 'a'"):
            list(failing)
        assert going_on.result(timeout=10) == expected


def test_run_returns_and_raises_what_the_work_does(running: Running) -> None:
    assert running.thread.run(lambda: threading.current_thread().name) == "engine"
    with pytest.raises(ZeroDivisionError):
        running.thread.run(lambda: 1 // 0)


def test_nobody_waits_for_a_thread_that_has_stopped(running: Running) -> None:
    with ThreadPoolExecutor(1) as threads:
        events = running.thread.generate(request("r", count=LONG))
        next(events)
        asking = threads.submit(list, events)
        running.thread.stop()
        with pytest.raises(Unavailable, match="being taken out of memory"):
            asking.result(timeout=5)
    with pytest.raises(Unavailable, match="being taken out of memory"):
        running.thread.run(int)
