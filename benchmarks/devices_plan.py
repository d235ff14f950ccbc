"""How plans hold for real runs: memory and time of `calibration.py`'s configurations. For `devices.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import calibration
from calibration import CONFIGURATIONS, SCALE, Found, Scale

_FAST_NAMES = ("adapter, short rows", "adapter, long rows, FULL")
_FAST_SCALE = Scale(hidden=64, layers=2)


def measured(folder: Path, rounds: int, *, is_fast: bool) -> dict[str, Any]:
    """Return the largest errors, and each configuration's figures; each is a run in a process of its own."""
    chosen = [one for one in CONFIGURATIONS if not is_fast or one.name in _FAST_NAMES]
    scale = _FAST_SCALE if is_fast else SCALE
    calibration.make_model(folder / "model", scale)
    runs = [[calibration.measured(one, folder / "model", scale) for one in chosen] for _ in range(rounds)]
    found = [middle(of_one) for of_one in zip(*runs, strict=True)]
    return {
        **calibration.largest_errors(found),
        "configurations": [asdict(one) for one in found],
        "time_errors": {one[0].name: [run.time_error for run in one] for one in zip(*runs, strict=True)},
    }


def middle(runs: Sequence[Found]) -> Found:
    """Return what runs of one configuration found: memory where the plan is off most, time where it is off as usual.

    How fast a machine is that is shared changes within a run; what a run holds does not.
    """
    usual = sorted(runs, key=lambda run: run.time_error)[len(runs) // 2]
    worst = max(runs, key=lambda run: run.memory_error)
    return replace(usual, memory=worst.memory, expected_memory=worst.expected_memory)
