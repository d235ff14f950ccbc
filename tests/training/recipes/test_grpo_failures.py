"""Reinforcement where graders fail: an error is no reward, and what fails a run says why in the grader's words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from tests.training.recipes.prompt_runs import LOSS, Run, songs
from transformers import PreTrainedModel

from luthier.errors import FailedPrecondition, Reason
from luthier.training.recipes import checkpoint
from luthier.training.recipes.course import CheckpointDue, Selection, StepDone
from luthier.training.recipes.rollouts import Reward, Rollout

ModelMaker = Callable[..., PreTrainedModel]


def out_of_ink(rollout: Rollout) -> Reward:
    del rollout
    return Reward(score=None, reason=Reason.SCORE_OUT_OF_RANGE, message="grader g: out of ink")


def test_failures_of_the_grader_are_no_rewards_and_too_many_end_the_run(tiny_llama: ModelMaker) -> None:
    def failing(one: Rollout) -> Reward:
        if one.sample == 5:
            return Reward(score=None, reason=Reason.REWARD_FAILED, message="grader g: out of ink")
        return songs(one)

    run = Run(tiny_llama(), failing, loss=replace(LOSS, max_grader_errors=10))
    steps: list[Mapping[str, float]] = []
    with pytest.raises(FailedPrecondition, match="12 are; the last of them: grader g: out of ink") as caught:
        steps += [event.metrics for event in run.events() if isinstance(event, StepDone)]
    assert caught.value.reason == Reason.REWARD_FAILED
    assert sorted(run.rollouts.stored) == [1, 2, 3]  # those that it failed for are kept too
    drawn = run.rollouts.stored[1]
    assert {one.advantage for one in drawn if one.sample == 5} == {0.0}
    for group in range(4):
        known = [one for one in drawn if one.group == group and one.sample != 5]
        assert sum(one.advantage for one in known) == pytest.approx(0.0, abs=1e-6)
    spared = Run(tiny_llama(), failing)
    metrics = spared.finish()
    assert [one["num_grader_errors"] for one in metrics] == [4] * 6


def test_a_step_without_any_score_ends_the_run_with_the_words_of_the_grader(tiny_llama: ModelMaker) -> None:
    run = Run(tiny_llama(), out_of_ink)
    words = "an answer of step 1 must have a score, none of 24 has; the last of them: grader g: out of ink"
    with pytest.raises(FailedPrecondition, match=words) as caught:
        run.finish()
    assert caught.value.reason == Reason.SCORE_OUT_OF_RANGE
    assert caught.value.metadata == {"num_grader_errors": "24"}
    assert sorted(run.rollouts.stored) == [1]


def test_a_step_with_answers_without_a_score_is_warned_of(tiny_llama: ModelMaker) -> None:
    run = Run(tiny_llama(), max_steps=1)
    run.rollouts.grader = lambda one: (
        out_of_ink(one) if run.rollouts.graded_splits[-1] == "TRAIN" and one.sample == 5 else songs(one)
    )
    run.finish()
    assert [(one.step, one.text) for one in run.warnings] == [
        (1, "step 1: 4 of 24 answers have no score; the last of them: grader g: out of ink")
    ]


def test_errors_are_counted_over_a_stop(tiny_llama: ModelMaker, tmp_path: Path) -> None:
    def failing(one: Rollout) -> Reward:
        return Reward(score=None, message="no") if one.sample == 0 else songs(one)

    first = Run(tiny_llama(), failing, loss=replace(LOSS, max_grader_errors=13))
    for event in first.events():
        if isinstance(event, CheckpointDue):
            checkpoint.save(tmp_path, first.engine, event.course, first.identity)
            break
    second = Run(tiny_llama(), failing, loss=replace(LOSS, max_grader_errors=13))
    course, _ = checkpoint.load(tmp_path, second.engine, second.identity)
    assert (course.step, course.grader_errors) == (2, 8)
    with pytest.raises(FailedPrecondition, match="15 are") as caught:
        second.finish(course=course)  # four more of step 3, and three of its validation
    assert caught.value.reason == Reason.REWARD_FAILED


def test_selection_goes_by_the_reward_of_validations(tiny_llama: ModelMaker) -> None:
    selection = Selection(metric="validation_reward", direction="MAX")
    run = Run(tiny_llama(), selection=selection, num_epochs=4)
    due = [event for event in run.events() if isinstance(event, CheckpointDue)]
    assert due[-1].course.best_step > 0
    assert due[-1].course.best_value > 0
    run = Run(tiny_llama(), selection=selection)
    run.rollouts.grader = lambda one: (
        songs(one) if run.rollouts.graded_splits[-1] == "TRAIN" else Reward(score=None, message="no")
    )
    words = "an answer of the validation of step 3 must have a score, none of 3 has; the last of them: no"
    with pytest.raises(FailedPrecondition, match=words) as caught:
        run.finish()
    assert caught.value.reason == Reason.REWARD_FAILED


def test_validation_answers_without_a_score_are_counted_and_warned_of(tiny_llama: ModelMaker) -> None:
    """Of three answers the first validation scores two, and the second none: nothing is judged by them."""
    run = Run(tiny_llama())

    def grade(one: Rollout) -> Reward:
        splits = run.rollouts.graded_splits
        if splits[-1] == "TRAIN":
            return songs(one)
        return Reward(score=0.5) if splits.count("VALIDATION") == 1 and one.group else out_of_ink(one)

    run.rollouts.grader = grade
    first, second = (one for one in run.finish() if "validation_grader_errors" in one)
    assert (first["validation_reward"], first["validation_grader_errors"]) == (0.5, 1)
    assert "validation_reward" not in second
    assert second["validation_grader_errors"] == 3
    assert [one.text for one in run.warnings] == [
        "step 3: 1 of 3 validation answers have no score; the last of them: grader g: out of ink",
        "step 6: 3 of 3 validation answers have no score; the last of them: grader g: out of ink",
    ]
