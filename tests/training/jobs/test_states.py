"""States of a job: only legal changes, whatever happens in whatever order."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.errors import FailedPrecondition
from luthier.training.jobs.rules import TRANSITIONS, State
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob
from luthier.work.lifecycle import Lifecycle

JOB = "projects/default/fineTuningJobs/one"
STATES = [number for number in State.values() if number]
LIFECYCLE = Lifecycle(FineTuningJob.State.DESCRIPTOR, TRANSITIONS)


@given(walk=st.lists(st.sampled_from(STATES), max_size=20))
def test_require_allows_exactly_the_legal_changes(walk: list[int]) -> None:
    current: int = State.STATE_QUEUED
    for state in walk:
        if state in TRANSITIONS[current]:
            LIFECYCLE.require(JOB, current, state)
            current = state
        else:
            with pytest.raises(FailedPrecondition, match=f"{JOB} is {LIFECYCLE.name(current)}"):
                LIFECYCLE.require(JOB, current, state)


@pytest.mark.parametrize("state", [State.STATE_CANCELLED, State.STATE_SUCCEEDED, State.STATE_FAILED])
def test_transitions_let_nothing_follow_a_final_state(state: int) -> None:
    assert TRANSITIONS[state] == ()


def test_transitions_reach_every_state_and_from_each_an_end() -> None:
    reached: set[int] = {State.STATE_QUEUED}
    for _ in STATES:
        reached |= {after for state in reached for after in TRANSITIONS[state]}
    assert reached == set(STATES)
    ending = {state for state in STATES if not TRANSITIONS[state]}
    for _ in STATES:
        ending |= {state for state in STATES if ending & set(TRANSITIONS[state])}
    assert ending == set(STATES)


async def test_a_job_keeps_the_time_of_its_first_start_and_has_an_end_once_it_is_over(bench: Any) -> None:
    made = await bench.create("one")
    assert not made.HasField("start_time")
    await bench.claim()
    first = await bench.job(JOB)
    assert first.start_time.ToNanoseconds() >= made.create_time.ToNanoseconds()
    await bench.queue.release_worker("worker", "2")
    await bench.claim()
    again = await bench.job(JOB)
    assert (again.num_attempts, again.start_time) == (2, first.start_time)
    assert not again.HasField("end_time")
    await bench.cancel(JOB)
    assert not (await bench.job(JOB)).HasField("end_time")
    await bench.queue.release_worker("worker", "3")
    ended = await bench.job(JOB)
    assert ended.state == State.STATE_CANCELLED
    assert ended.end_time.ToNanoseconds() >= again.start_time.ToNanoseconds()
