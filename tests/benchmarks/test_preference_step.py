"""The benchmark of DPO steps: the same work for all, and the right figures from what was measured."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import preference_step
import pytest
from preference_step import outcome_of, pair_of, summary_of, table
from preference_step_contenders import CONTENDERS, OURS, Pair, PairTask, measure
from sft_step_task import Row

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> PairTask:
    arguments = Namespace(pairs=16, data=None, model=None, fast=True, micro_batch_tokens=512)
    return preference_step.make_task(arguments, tmp_path_factory.mktemp("task"))


def run(seconds: list[float], rss: float) -> dict[str, Any]:
    return {
        "step_seconds": seconds,
        "step_tokens": [100] * len(seconds),
        "losses": [0.69, 0.5],
        "peak_rss_bytes": rss,
        "threads": 2,
    }


def test_pair_of_takes_the_other_rows_answer_for_the_rejected_one() -> None:
    row = Row(ids=(1, 2, 3, 4), supervised=(False, False, True, True))
    other = Row(ids=(5, 6, 7), supervised=(False, True, True))
    assert pair_of(row, other) == Pair(prompt=(1, 2), chosen=(3, 4), rejected=(6, 7))
    assert pair_of(row, other).num_tokens == 8


def test_task_survives_its_file_and_every_pair_is_in_one_step(task: PairTask, tmp_path: Path) -> None:
    task.save(tmp_path / "task.json")
    assert PairTask.load(tmp_path / "task.json") == task
    steps = task.steps()
    assert [len(step) for step in steps] == [8, 8]
    assert sorted(pair for step in steps for pair in map(repr, step)) == sorted(map(repr, task.pairs))
    corpus = task.corpus()
    batch = corpus.pack([2, 3])
    assert batch.roles == ("chosen", "rejected")
    assert batch.input_ids.tolist() == [
        *(task.pairs[1].prompt + task.pairs[1].chosen),
        *(task.pairs[1].prompt + task.pairs[1].rejected),
    ]


def test_ours_makes_the_steps_of_the_task(task: PairTask) -> None:
    measured = measure(task, OURS)
    assert len(measured["step_seconds"]) == len(measured["losses"]) == task.num_steps == 2
    assert measured["losses"][0] == pytest.approx(0.6931, abs=0.01), "the policy begins as the reference"
    assert sum(measured["step_tokens"]) == sum(pair.num_tokens for pair in task.pairs)


def test_summary_compares_with_the_fastest_setting() -> None:
    outcomes: dict[str, Any] = {
        OURS: outcome_of([run([9.0, 1.0], 1e9), run([9.0, 2.0], 1e9), run([9.0, 1.0], 1e9)]),
        "trl_defaults": outcome_of([run([9.0, 5.0], 4e9)]),
        "trl_no_checkpointing": outcome_of([run([9.0, 4.0], 5e9)]),
        "trl_small_batches": {"error": "exit 1"},
        "trl_float32": outcome_of([run([9.0, 4.5], 6e9)]),
        "trl_float32_small_batches": {"error": "exit 1"},
    }
    assert outcomes[OURS]["tokens_per_second"] == 100.0
    summary = summary_of(outcomes)
    assert summary == {
        "dpo_vs_trl": 4.0,
        "dpo_rss_vs_trl": 0.2,
        "best_setting": "trl_no_checkpointing",
        "last_loss_gap": 0.0,
    }
    assert "did not run: exit 1" in table(outcomes)
    assert set(outcomes) == set(CONTENDERS)
    assert summary_of({OURS: outcomes[OURS], "trl_defaults": {"error": "x"}})["dpo_vs_trl"] is None


def test_too_few_pairs_are_refused() -> None:
    for pairs in (8, 20):
        arguments = Namespace(pairs=pairs, data=None, model=None, fast=True, micro_batch_tokens=512)
        with pytest.raises(ValueError, match=f"a multiple of 8 from 16 on, got {pairs}"):
            preference_step.make_task(arguments, Path())
