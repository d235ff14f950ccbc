"""What TRL's trainers tell of their steps, for a meter."""

from __future__ import annotations

from typing import Any

from sft_step_meter import Meter
from transformers import TrainerCallback


class Reporter(TrainerCallback):
    """Tells the meter what the trainer tells its callbacks; what it logs under `name` is added to `values`."""

    def __init__(self, meter: Meter, values: list[float], name: str) -> None:
        self._meter = meter
        self._values = values
        self._name = name

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """The first step begins."""
        self._meter.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """A step is done."""
        self._meter.step_done()

    def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        """Something is logged."""
        if logs and self._name in logs:
            self._values.append(float(logs[self._name]))
