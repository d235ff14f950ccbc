"""The benchmark of children and ranks: the same work on both sides, and the right figures of what was measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import devices
import pytest
import torch
from devices_work import LocalDesk, Work, bare_seconds

from luthier.training.worker.computing import computed


def test_the_bare_recipe_and_the_desk_make_the_same_steps(tmp_path: Path) -> None:
    work = Work(tmp_path / "work", replace(devices.TINY, steps=4))
    torch.save(devices.desk_of(work).order, work.folder / "order.pt")
    assert len(bare_seconds(work.folder)) == 3
    desk: LocalDesk = devices.desk_of(work, checkpoint_interval=2)
    computed(desk.order, desk, torch.device("cpu"))  # type: ignore[arg-type]
    assert len(desk.step_times) == 4
    assert desk.checkpoint_step == 4
    again = devices.desk_of(work, checkpoint_interval=2)
    again.order.task.train.checkpoint_files.extend(desk.checkpoint.values())
    again.order.task.train.checkpoint_step = 4
    again.checkpoint, again.kept = dict(desk.checkpoint), desk.kept
    assert computed(again.order, again, torch.device("cpu")).step == 4  # type: ignore[arg-type]
    assert again.step_times == [], "it goes on behind the last step"


def test_a_ratio_is_of_medians_without_the_first_steps_of_each_round() -> None:
    left = iter([[9.0, 9.0, 1.0, 3.0], [9.0, 9.0, 2.0]])
    right = iter([[8.0, 8.0, 4.0], [8.0, 8.0, 4.0, 4.0]])
    found = devices.ratio(lambda: next(left), lambda: next(right), rounds=2)
    assert found == pytest.approx({"left": 2.0, "right": 4.0, "ratio": 0.5})
