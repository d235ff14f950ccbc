"""What a training measures of itself for operators: where its time goes, what it holds, how busy it is."""

from __future__ import annotations

import time

import torch

from luthier.lm.memory import peak_bytes
from luthier.training.recipes.phases import PhaseClock
from luthier.training.worker.order import Desk
from luthier.worker.v1 import worker_service_pb2

_APART_SECONDS = 1.0


class Measuring:
    """Tells a desk once a second at most: steps may take a hundredth of that.

    Args:
        desk: is told.
        clock: knows what time is spent on.
        device: what the training computes on.
    """

    def __init__(self, desk: Desk, clock: PhaseClock, device: torch.device) -> None:
        self._desk = desk
        self._clock = clock
        self._device = device
        self._told_at = float("-inf")
        self._wall, self._cpu = time.monotonic(), time.process_time()

    def tell(self) -> None:
        """Tell what is new, unless that was just done."""
        now = time.monotonic()
        if now - self._told_at < _APART_SECONDS:
            return
        self._told_at = now
        figures = worker_service_pb2.TaskFigures(
            phase_seconds={str(phase): seconds for phase, seconds in self._clock.seconds().items()},
            peak_memory_bytes=peak_bytes(self._device),
            device_use=self._use(now) if self._device.type == "cpu" else 0.0,
        )
        self._desk.measured(figures)

    def _use(self, now: float) -> float:
        """Return the share of its threads' time that this process computed since it was asked last."""
        cpu = time.process_time()
        wall_seconds, cpu_seconds = now - self._wall, cpu - self._cpu
        self._wall, self._cpu = now, cpu
        if not wall_seconds:
            return 0.0
        return min(1.0, cpu_seconds / (wall_seconds * torch.get_num_threads()))
