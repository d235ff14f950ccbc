"""The learning rate as a closed form of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum


class RateCourse(StrEnum):
    """Course of the learning rate after warm-up."""

    CONSTANT = "CONSTANT"
    LINEAR = "LINEAR"
    COSINE = "COSINE"
    WARMUP_STABLE_DECAY = "WARMUP_STABLE_DECAY"


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A learning rate over a run.

    Attributes:
        peak: highest learning rate.
        course: how it falls after warm-up.
        warmup_steps: steps before the peak is reached.
        num_steps: steps of the whole run.
        decay_steps: of WARMUP_STABLE_DECAY alone: the last steps, over which it falls linearly (arXiv:2404.06395).
    """

    peak: float
    course: RateCourse
    warmup_steps: int
    num_steps: int
    decay_steps: int = 0

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of one step, from 1 to num_steps; it is never 0.

        During warm-up it rises by peak / (warmup_steps + 1) a step; the step after warm-up has the peak, and
        the course would reach zero one step after the last.
        """
        assert 1 <= step <= self.num_steps, f"step {step} of {self.num_steps}"
        if step <= self.warmup_steps:
            return self.peak * step / (self.warmup_steps + 1)
        done = (step - 1 - self.warmup_steps) / (self.num_steps - self.warmup_steps)
        match self.course:
            case RateCourse.CONSTANT:
                return self.peak
            case RateCourse.LINEAR:
                return self.peak * (1.0 - done)
            case RateCourse.COSINE:
                return self.peak * 0.5 * (1.0 + math.cos(math.pi * done))
            case RateCourse.WARMUP_STABLE_DECAY:
                decayed = max(0, step - (self.num_steps - self.decay_steps))
                return self.peak * (1.0 - decayed / (self.decay_steps + 1))


def steps_of_ratio(ratio: float, num_steps: int) -> int:
    """Return a share of a run's steps, rounded up, as transformers does for a warm-up."""
    # So that 0.07 of 100 steps are 7, and not 8 for its binary remainder.
    return math.ceil(round(ratio * num_steps, 6))
