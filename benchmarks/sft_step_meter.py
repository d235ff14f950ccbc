"""When each step of a run ended, what it lost, and, where asked, what the second step's time went into."""

from __future__ import annotations

import time
from pathlib import Path

from sft_step_costs import Costs, group_costs
from torch.profiler import ProfilerActivity, profile


class Meter:
    """What a contender tells while it trains: `begin` once, then `step_done` after each step.

    With `profiling`, the step after the first one runs under torch's profiler; its costs are then in `costs`, what
    works on logits of `vocab_size` numbers counted with the loss.
    """

    def __init__(self, *, profiling: bool = False, vocab_size: int = 0) -> None:
        self.ends: list[float] = []
        self.losses: list[float] = []
        self.costs: Costs | None = None
        self.is_profiling = profiling
        self._vocab_size = vocab_size
        self._profiler = profile(activities=[ProfilerActivity.CPU], record_shapes=True) if profiling else None

    def begin(self) -> None:
        """The first step begins now."""
        self.ends.append(time.perf_counter())

    def step_done(self) -> None:
        """A step has ended."""
        self.ends.append(time.perf_counter())
        if self._profiler is None:
            return
        if len(self.ends) == 2:
            self._profiler.start()
            self.ends[-1] = time.perf_counter()
        elif len(self.ends) == 3:
            self._profiler.stop()
            events = self._profiler.events()  # type: ignore[no-untyped-call]
            self.costs = group_costs(events or [], self.ends[2] - self.ends[1], self._vocab_size)

    def step_seconds(self) -> list[float]:
        """Seconds of each step, the first one, which warms up and compiles, included."""
        return [after - before for before, after in zip(self.ends, self.ends[1:], strict=False)]


def peak_rss_bytes() -> int:
    """Most memory that this process has held, file-backed pages included.

    VmHWM and not getrusage: the latter keeps what the parent held before exec.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status must have a line VmHWM, it has none")
