"""The benchmarks of drawing and of GRPO steps: the same work for all, and the right figures from what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import generation
import grpo_step
import pytest
import serving
from serving_first_token import FirstTokens
from turns import OURS, Contender, DrawTask, make_task, run_child

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> DrawTask:
    folder = tmp_path_factory.mktemp("task")
    return make_task(folder, 4, model=None, fast=True, num_samples=3, new_tokens=5, num_steps=2)


def test_task_survives_its_file(task: DrawTask, tmp_path: Path) -> None:
    task.save(tmp_path / "task.json")
    assert DrawTask.load(tmp_path / "task.json") == task
    assert len(task.prompts) == 4
    assert len({len(prompt) for prompt in task.prompts}) >= 1
    assert all(task.prompts)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT asks transformers what that renamed
def test_everyone_draws_as_many_tokens(task: DrawTask) -> None:
    for name in generation.CONTENDERS:
        measured = generation.CONTENDERS[name].run(task)
        assert measured["tokens"] == [4 * 3 * 5] * 2, name
        assert len(measured["seconds"]) == 2


def test_ours_makes_the_steps_of_the_task(task: DrawTask) -> None:
    measured = grpo_step.CONTENDERS[OURS].run(task)
    assert len(measured["step_seconds"]) == len(measured["rewards"]) == 2
    assert 0.2 < measured["rewards"][0] < 0.8


def test_what_is_not_installed_or_fails_is_told(task: DrawTask, tmp_path: Path) -> None:
    task.save(tmp_path / "task.json")
    absent = Contender(run=lambda _: {}, configuration="", packages=("no_such_package",))
    assert run_child(Path("x.py"), tmp_path / "task.json", "a", absent) == {
        "error": "no_such_package not installed (pip install -e .[bench])"
    }
    present = Contender(run=lambda _: {}, configuration="")
    assert run_child(tmp_path / "x.py", tmp_path / "task.json", "a", present)["error"].startswith("exit 2")


def test_summaries_compare_with_the_fastest_setting() -> None:
    runs: dict[str, Any] = {
        OURS: [{"tokens": [100], "seconds": [one]} for one in (1.0, 0.5, 2.0)],
        "transformers_bfloat16": [{"tokens": [100], "seconds": [5.0]}],
        "transformers_float32": [{"tokens": [100], "seconds": [2.0]}],
    }
    found = generation.summary_of(runs)
    assert (found["generate_vs_transformers"], found["best_setting"]) == (2.0, "transformers_float32")
    assert set(runs) == set(generation.CONTENDERS)
    assert generation.summary_of({OURS: runs[OURS]})["generate_vs_transformers"] is None
    steps: dict[str, Any] = {
        OURS: [{"step_seconds": [9.0, 2.0], "peak_rss_bytes": 1e9}],
        "trl_defaults": [{"error": "exit 1"}],
        "trl_no_checkpointing": [{"step_seconds": [9.0, 8.0], "peak_rss_bytes": 4e9}],
        "trl_float32": [{"step_seconds": [9.0, 9.0], "peak_rss_bytes": 3e9}],
    }
    assert set(steps) == set(grpo_step.CONTENDERS)
    found = grpo_step.summary_of(steps)
    assert (found["grpo_vs_trl"], found["grpo_rss_vs_trl"]) == (4.0, 0.25)
    assert (
        grpo_step.summary_of({OURS: [{"error": "x"}], "trl_float32": steps["trl_float32"]})["grpo_vs_trl"]
        is None
    )


def figures(of: dict[str, Any]) -> dict[str, Any]:
    return {name: of.get(name) for name in ("generate_vs_transformers", *serving.FIGURES)}


@pytest.mark.parametrize(("is_down", "words"), [(False, ()), (True, ()), (False, ("--drawing-only",))])
def test_the_last_line_has_every_figure_of_generation(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *,
    is_down: bool,
    words: tuple[str, ...],
) -> None:
    """What runs for minutes is left out; each part says here what it would have measured."""
    served = {name: float(number) for number, name in enumerate(serving.FIGURES)}
    asked: list[tuple[Any, ...]] = []

    def serve(model: Path | None, repeats: int, *, fast: bool) -> tuple[dict[str, Any], bool]:
        asked.append((model, repeats, fast))
        return {**served, "best_setting": "another", "tokens_per_second": {}}, is_down

    drawn = [{"tokens": [100], "seconds": [1.0]}]
    runs = {OURS: drawn, "transformers_float32": [{"tokens": [50], "seconds": [1.0]}]}
    monkeypatch.setattr(generation, "in_turns", lambda *_: runs)
    monkeypatch.setattr(serving, "measured", serve)
    assert generation.main(["--fast", "--repeats", "2", *words]) == int(is_down)
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["best_setting"] == "transformers_float32", "of drawing, which its other keys are about"
    expected = {"generate_vs_transformers": 2.0} | ({} if words else served)
    assert figures(last) == figures(expected)
    assert asked == ([] if words else [(None, 2, True)])


def test_every_figure_of_serving_is_one_that_it_measures() -> None:
    first = FirstTokens(num_tokens=3, bare=[0.1], idle=[0.3], busy=[0.4])
    assert set(serving.FIGURES) <= set(serving.summary_of({}, {}) | first.summary())
