"""What checkpoints cost a loop is told from quiet steps, and measured through real services."""

from __future__ import annotations

from pathlib import Path

import devices_stall
import pytest
from devices_stall import Seen, costs


def seen_of(*lengths: float, commits: dict[int, float]) -> Seen:
    """Return steps of such lengths, the first from second 0 on."""
    ends = [sum(lengths[: place + 1]) for place in range(len(lengths))]
    return Seen(steps=dict(enumerate(ends, start=1)), commits=commits)


def test_a_stall_is_what_the_step_behind_a_checkpoint_takes_more() -> None:
    # Steps 1 and 2 are cold; the checkpoint of step 5 waits a second and slows the step after the next one by half.
    seen = seen_of(9.0, 9.0, 2.0, 2.0, 2.0, 3.0, 2.5, 2.0, 2.0, commits={5: 28.0})
    found = costs(seen)
    assert (found["step_seconds"], found["quiet_steps"], found["checkpoints"]) == (2.0, 5, 1)
    assert (found["stall_seconds"], found["stall_steps"]) == (1.0, 0.5)
    assert found["excess_steps"] == pytest.approx(0.75)
    assert found["store_seconds"] == pytest.approx(4.0)


def test_it_is_the_median_of_all_checkpoints_and_the_largest_stands_beside() -> None:
    lengths = [2.0] * 20
    lengths[5], lengths[9], lengths[13] = 3.0, 6.0, 4.0
    ends = [sum(lengths[: place + 1]) for place in range(len(lengths))]
    commits = {5: ends[4] + 0.5, 9: ends[8] + 0.5, 13: ends[12] + 0.5}
    found = costs(seen_of(*lengths, commits=commits))
    assert (found["stall_steps"], found["largest_stall_steps"]) == (1.0, 2.0)


def test_the_checkpoint_at_the_end_stalls_no_step() -> None:
    found = costs(seen_of(2.0, 2.0, 2.0, 3.0, 2.0, commits={3: 6.5, 5: 12.0}))
    assert found["checkpoints"] == 1


@pytest.mark.parametrize("commits", [{}, {1: 100.0}])
def test_without_quiet_steps_or_checkpoints_there_is_no_figure(commits: dict[int, float]) -> None:
    with pytest.raises(ValueError, match="there must be quiet steps and steps behind a checkpoint"):
        costs(seen_of(1.0, 1.0, 1.0, 1.0, commits=commits))


@pytest.mark.long
def test_a_real_job_tells_what_its_checkpoints_cost(tmp_path: Path) -> None:
    found = devices_stall.measured(tmp_path, devices_stall.FAST)
    assert found["checkpoints"] == devices_stall.FAST.num_checkpoints
    assert found["quiet_steps"] > 5
    assert found["step_seconds"] > 0 < found["store_seconds"]
    assert found["checkpoint_bytes"] > 100_000
