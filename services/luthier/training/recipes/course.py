"""How far a run has come, what every recipe tells of on its way, and which of its steps is the best."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

TIMED_METRICS = frozenset({"tokens_per_second", "sampling_seconds", "grading_seconds", "training_seconds"})
"""Metrics that depend on the clock, and so differ between runs that are otherwise the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """How far a run has come.

    Attributes:
        step: optimiser steps made.
        epoch: pass over the rows of the last step made, from 0.
        position: number of that step within its epoch, from 0.
        metrics: of that step, those that depend on the clock left out.
        best_step: the step with the best validation by the run's selection; 0: none yet, or no selection.
        best_value: its value there.
        stale_validations: validations since then, none of them better.
        is_stopped: whether the run has ended early, after so many as its selection allows.
        idle_steps: steps that taught nothing, and left weights and optimiser as they were.
        cut_steps: those of them whose answers had different rewards, but all that could have taught were cut.
        grader_errors: answers so far that got no score.
    """

    step: int = 0
    epoch: int = 0
    position: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    best_step: int = 0
    best_value: float = 0.0
    stale_validations: int = 0
    is_stopped: bool = False
    idle_steps: int = 0
    cut_steps: int = 0
    grader_errors: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which validation is the best, and when a run ends early.

    Attributes:
        metric: name of a metric that validations give.
        direction: whether a lower or a higher value is better.
        min_delta: a value that is better by no more than this is not.
        patience: validations without a better one after which the run ends; 0: it never ends early.
    """

    metric: str
    direction: Literal["MIN", "MAX"]
    min_delta: float = 0.0
    patience: int = 0

    def judged(self, course: Course, value: float) -> Course:
        """Return the course of a run whose last step was validated with such a value."""
        assert math.isfinite(value), f"{self.metric} is {value}"
        gain = course.best_value - value if self.direction == "MIN" else value - course.best_value
        if course.best_step == 0 or gain > self.min_delta:
            return replace(course, best_step=course.step, best_value=value, stale_validations=0)
        stale = course.stale_validations + 1
        return replace(course, stale_validations=stale, is_stopped=0 < self.patience <= stale)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDone:
    """An optimiser step was made. The engine stands where a checkpoint may be taken, until the loop goes on.

    `course` is where the run stands then.
    """

    step: int
    metrics: Mapping[str, float]
    course: Course


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointDue:
    """A checkpoint is to be taken where the engine stands, until the loop goes on.

    One is due at each step that is the best so far by the run's selection, and at the last step of all.
    """

    course: Course


@dataclass(frozen=True, slots=True, kw_only=True)
class Warned:
    """Something about a step that whoever watches should know; the run goes on."""

    step: int
    text: str


Event = StepDone | CheckpointDue
