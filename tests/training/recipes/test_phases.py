"""Each moment of a run belongs to one phase."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from tests.training.recipes import prompt_runs, test_sft
from transformers import PreTrainedModel

from luthier.training.recipes.phases import PhaseClock

ModelMaker = Callable[..., PreTrainedModel]


class Clock:
    def __init__(self) -> None:
        self.now = 10.0

    def __call__(self) -> float:
        return self.now


def test_time_goes_to_the_phase_that_was_entered_last() -> None:
    clock = Clock()
    phases = PhaseClock(clock)
    clock.now += 100.0  # before the first phase: nobody's
    phases.enter("data")
    clock.now += 1.0
    phases.enter("compute")
    clock.now += 2.0
    with phases.within("validation"):
        clock.now += 4.0
    clock.now += 8.0
    assert phases.seconds() == {"data": 1.0, "compute": 10.0, "validation": 4.0}
    clock.now += 16.0
    assert phases.seconds()["compute"] == 26.0, "also while it goes on"
    phases.enter(None)
    clock.now += 32.0
    assert sum(phases.seconds().values()) == 31.0


def test_a_block_that_raises_is_left_all_the_same() -> None:
    clock = Clock()
    phases = PhaseClock(clock)
    phases.enter("compute")
    try:
        with phases.within("sampling"):
            clock.now += 1.0
            raise RuntimeError
    except RuntimeError:
        clock.now += 2.0
    assert phases.seconds() == {"sampling": 1.0, "compute": 2.0}


def test_the_time_of_a_training_goes_to_its_phases(
    tiny_llama: ModelMaker, token_rows: Callable[..., list[Any]]
) -> None:
    corpus = test_sft.corpus_of(token_rows(40))
    run = test_sft.Run(tiny_llama(), corpus, test_sft.settings_for(corpus))
    events = run.begin()
    clock = run.engine.clock
    began = time.perf_counter()
    for _ in events:
        clock.enter("waiting")  # as the worker does, which tells of the step meanwhile
        time.sleep(0.01)
    wall_seconds = time.perf_counter() - began
    seconds = clock.seconds()
    assert set(seconds) == {"data", "compute", "validation", "waiting"}
    assert seconds["waiting"] >= 0.01 * run.settings.schedule.num_steps
    assert seconds["compute"] > seconds["data"]
    assert 0.8 * wall_seconds < sum(seconds.values()) <= wall_seconds


def test_the_time_of_reinforcement_goes_to_its_phases(tiny_llama: ModelMaker) -> None:
    run = prompt_runs.Run(tiny_llama())
    run.finish()
    seconds = run.engine.clock.seconds()
    assert set(seconds) == {"data", "compute", "sampling", "validation"}
    assert seconds["sampling"] > seconds["validation"] > 0.0
