"""Children and ranks are compared by the same work on both sides, and a rank is killed for real."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import devices_ranks
import pytest
import torch
from devices_turns import Side
from devices_work import LocalDesk, Work, bare_steps

from luthier.training.worker.computing import computed


def test_the_bare_recipe_and_the_desk_make_the_same_steps(tmp_path: Path) -> None:
    work = Work(tmp_path / "work", replace(devices_ranks.TINY, steps=4))
    torch.save(devices_ranks.desk_of(work).order, work.folder / "order.pt")
    assert list(bare_steps(work.folder)) == [1, 2, 3, 4]
    desk: LocalDesk = devices_ranks.desk_of(work, checkpoint_interval=2)
    computed(desk.order, desk, torch.device("cpu"))
    assert len(desk.step_times) == 4
    assert desk.checkpoint_step == 4
    again = devices_ranks.desk_of(work, checkpoint_interval=2)
    again.order.task.train.checkpoint_files.extend(desk.checkpoint.values())
    again.order.task.train.checkpoint_step = 4
    again.checkpoint, again.kept = dict(desk.checkpoint), desk.kept
    assert computed(again.order, again, torch.device("cpu")).step == 4
    assert again.step_times == [], "it goes on behind the last step"


def test_a_bare_recipe_that_fails_says_why(tmp_path: Path) -> None:
    work = Work(tmp_path / "work", replace(devices_ranks.TINY, steps=2))
    (work.folder / "model" / "config.json").write_text("{")
    with pytest.raises(RuntimeError, match="the bare recipe ended with 1: "):
        devices_ranks.bare_side("bare", work, 1).run(lambda: None)


def test_a_ratio_is_the_median_of_turns_beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[str, str]] = []
    turns = {"left": iter([[2.0], [2.0, 6.0]]), "right": iter([[4.0], [4.0, 2.0]])}

    def take_turns(first: Side, second: Side) -> None:
        order.append((first.name, second.name))
        for side in (first, second):
            side.seconds.extend(next(turns[side.name]))

    monkeypatch.setattr(devices_ranks, "take_turns", take_turns)
    made = [lambda name=name: Side(name=name, run=lambda _: None) for name in ("left", "right")]
    found = devices_ranks.ratio(made[0], made[1], rounds=2)
    assert order == [("left", "right"), ("right", "left")]
    # Turns: 2 by 4, 2 by 4, 6 by 2.
    assert found == {
        "left": 2.0,
        "right": 4.0,
        "ratio": 0.5,
        "quartiles": [0.5, 1.75],
        "by_round": [0.5, 1.75],
    }


@pytest.mark.long
def test_the_next_attempt_goes_on_after_a_rank_was_killed(tmp_path: Path) -> None:
    found = devices_ranks.kill_cost(tmp_path, 1, is_fast=True)
    assert found["by_round"] == [found["seconds"]]
    assert 0 < found["seconds"] < 120


def test_a_training_that_loses_no_rank_is_no_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices_ranks, "Torchrun", lambda *_: lambda order, desk, context: None)
    monkeypatch.setattr(devices_ranks, "_kill_second", lambda *_: None)
    work = Work(tmp_path / "work", replace(devices_ranks.TINY, steps=2))
    with pytest.raises(RuntimeError, match="must lose its killed rank"):
        devices_ranks.kill_seconds(work, None)  # type: ignore[arg-type]  # nobody is started
