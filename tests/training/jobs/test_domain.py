"""States of a job: only legal changes, whatever happens in whatever order."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.training.jobs.domain import (
    TRANSITIONS,
    Hyperparameters,
    Job,
    JobState,
    LearningRateSchedule,
    LoraSettings,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def job() -> Job:
    return Job(
        name="projects/default/fineTuningJobs/a",
        uid="u",
        state=JobState.QUEUED,
        labels={},
        create_time=NOW,
        update_time=NOW,
        revision=1,
        display_name="",
        base_model="m",
        rendering="r",
        base_model_digest="",
        rendering_digest="",
        lora=LoraSettings(rank=1, alpha=1.0),
        hyperparameters=Hyperparameters(
            num_epochs=1,
            max_steps=0,
            batch_tokens=1,
            batch_rows=0,
            micro_batch_tokens=1,
            learning_rate=1.0,
            warmup_steps=0,
            learning_rate_schedule=LearningRateSchedule.COSINE,
            weight_decay=0.0,
            max_grad_norm=0.0,
            seed=0,
        ),
        checkpoint_interval_steps=1,
        validation_interval_steps=0,
        tuned_model_id="a",
    )


@given(walk=st.lists(st.sampled_from(list(JobState)), max_size=20))
def test_moved_allows_exactly_the_legal_changes(walk: list[JobState]) -> None:
    current = job()
    for hour, state in enumerate(walk):
        now = NOW + timedelta(hours=hour)
        if state in TRANSITIONS[current.state]:
            current = current.moved(state, now)
            assert current.state is state
        else:
            with pytest.raises(AssertionError, match=f"cannot go from {current.state} to {state}"):
                current.moved(state, now)
        assert (current.end_time is not None) == current.final


@pytest.mark.parametrize("state", [JobState.CANCELLED, JobState.SUCCEEDED, JobState.FAILED])
def test_transitions_let_nothing_follow_a_final_state(state: JobState) -> None:
    assert TRANSITIONS[state] == frozenset()


def test_transitions_reach_every_state_and_from_each_an_end() -> None:
    reached = {JobState.QUEUED}
    for _ in JobState:
        reached |= {after for state in reached for after in TRANSITIONS[state]}
    assert reached == set(JobState)
    ending = {state for state in JobState if not TRANSITIONS[state]}
    for _ in JobState:
        ending |= {state for state in JobState if TRANSITIONS[state] & ending}
    assert ending == set(JobState)


def test_moved_keeps_the_time_of_the_first_start() -> None:
    first = job().moved(JobState.PREPARING, NOW)
    again = first.moved(JobState.QUEUED, NOW).moved(JobState.PREPARING, NOW + timedelta(hours=1))
    assert again.start_time == NOW
