"""How plans hold for real runs: memory and time of `calibration.py`'s configurations. For `devices.py`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import calibration
from calibration import CONFIGURATIONS, SCALE, Scale

_FAST_NAMES = ("adapter, short rows", "adapter, long rows, FULL")
_FAST_SCALE = Scale(hidden=64, layers=2)


def measured(folder: Path, *, is_fast: bool) -> dict[str, Any]:
    """Return the largest errors, and each configuration's figures; each is a run in a process of its own."""
    chosen = [one for one in CONFIGURATIONS if not is_fast or one.name in _FAST_NAMES]
    scale = _FAST_SCALE if is_fast else SCALE
    calibration.make_model(folder / "model", scale)
    found = [calibration.measured(one, folder / "model", scale) for one in chosen]
    return {**calibration.largest_errors(found), "configurations": [asdict(one) for one in found]}
