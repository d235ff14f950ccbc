"""The benchmark of answering: the same work for all, and the right figures from what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import serving
from serving_first_token import FirstTokens
from sft_step import made_up_records
from turns import OURS, DrawTask, make_task, with_shots

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> DrawTask:
    folder = tmp_path_factory.mktemp("task")
    return make_task(folder, 4, model=None, fast=True, num_samples=1, new_tokens=5, num_steps=1)


def test_prompts_behind_the_same_examples_survive_their_file(task: DrawTask, tmp_path: Path) -> None:
    shot = with_shots(task, made_up_records(2))
    shot.save(tmp_path / "task.json")
    assert DrawTask.load(tmp_path / "task.json") == shot
    assert shot.num_shared > 0
    assert len({prompt[: shot.num_shared] for prompt in shot.prompts}) == 1
    assert tuple(prompt[shot.num_shared :] for prompt in shot.prompts) == task.prompts


def test_everyone_answers_with_as_many_tokens(task: DrawTask) -> None:
    shot = with_shots(task, made_up_records(2))
    for name, contender in serving.EVALUATING.items():
        measured = contender.run(shot)
        assert measured["tokens"] == [4 * 5], name
        assert measured["peak_rss_bytes"] > 0


def test_all_that_come_are_answered_either_way(task: DrawTask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "ARRIVAL_SECONDS", 0.3)
    coming = serving.arrivals(task)
    assert coming == serving.arrivals(task)
    assert all(0 <= one.at <= 0.3 for one in coming)
    for name, contender in serving.SERVING.items():
        measured = contender.run(task)
        assert measured["tokens"] == sum(one.new_tokens for one in coming), name
        assert 0 < measured["mean_latency_seconds"] <= measured["largest_latency_seconds"]


def test_a_summary_compares_with_the_fastest_setting() -> None:
    def run(seconds: float, memory: float) -> dict[str, Any]:
        return {"tokens": [100], "seconds": [seconds], "peak_rss_bytes": memory}

    evaluated: dict[str, Any] = {
        OURS: [run(one, 1e9) for one in (1.0, 0.5, 2.0)],
        "transformers_bfloat16_16": [run(4.0, 2e9)],
        "transformers_bfloat16_64": [run(5.0, 9e9)],
        "transformers_float32_16": [run(6.0, 1e9)],
        "transformers_float32_64": [{"error": "exit 1"}],
    }
    served: dict[str, Any] = {
        "continuous": [{"mean_latency_seconds": one} for one in (1.0, 9.0, 2.0)],
        "batches": [{"mean_latency_seconds": 8.0}],
    }
    assert evaluated.keys() == serving.EVALUATING.keys()
    found = serving.summary_of(evaluated, served)
    assert found["best_setting"] == "transformers_bfloat16_16"
    assert (found["evaluate_vs_transformers"], found["evaluate_rss_ratio"]) == (4.0, 0.5)
    assert found["continuous_latency_ratio"] == 0.25
    alone = serving.summary_of({OURS: evaluated[OURS]}, {"continuous": served["continuous"]})
    assert (alone["evaluate_vs_transformers"], alone["continuous_latency_ratio"]) == (None, None)


def test_first_tokens_are_told_by_those_of_the_bare_model() -> None:
    found = FirstTokens(num_tokens=3, bare=[0.1, 0.5, 0.2], idle=[0.3], busy=[0.4, 0.3, 0.8])
    assert found.summary() == {
        "first_token_idle": 1.5,
        "first_token_busy": 2.0,
        "first_token_busy_worst": 4.0,
    }
    assert found.details()["num_tokens"] == 3
