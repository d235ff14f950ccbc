"""How far a run has come, and what every recipe tells of on its way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """How far a run has come.

    Attributes:
        step: optimiser steps made.
        epoch: pass over the rows of the last step made, from 0.
        position: number of that step within its epoch, from 0.
        metrics: of that step, those that depend on the clock left out.
    """

    step: int = 0
    epoch: int = 0
    position: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDone:
    """An optimiser step was made."""

    step: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointDue:
    """The engine stands where a checkpoint is to be taken, until the loop goes on."""

    course: Course


Event = StepDone | CheckpointDue
