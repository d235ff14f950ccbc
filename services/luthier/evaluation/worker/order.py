"""What the evaluation worker orders of a process that holds a base model, and what both say of it. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from luthier.lm.generate import FinishReason
from luthier.lm.precision import Precision

GENERATE = "generate"
"""Asks for a `GenerationRequest`; each part of the answer is a list of `Said`."""
UNFIT = "unfit"
"""Asks what the engine would refuse of several `GenerationRequest`s; the answer is an error or None for each."""
MEASURE = "measure"
"""Asks for the `SequenceScore`s of `Measured`."""
DISTRIBUTE = "distribute"
"""Asks to write the distributions at the chosen tokens of `Measured` to a file."""
COMPARE = "compare"
"""Asks for the `SequenceDivergence`s of `Measured` from the distributions of a file."""
VALUES = "values"
"""Asks for the values that the head of `Valued` makes of the last tokens of sequences."""
LOAD_REWARD = "load_reward"
"""Asks to put a reward model's adapter into the model, with its head, as LOAD_ADAPTER puts others."""
LOAD_ADAPTER = "load_adapter"
"""Asks to put the adapter of a folder into the model, under a name, unless one of that name is there."""
REMOVE_ADAPTER = "remove_adapter"
"""Asks to take the adapter of a name out of the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOrder:
    """A base model to load.

    Attributes:
        folder: its files, which may go once they are loaded.
        precision: what its linear layers are held in.
        is_reward: whether it is a reward model with all its weights, which makes values and no words.
    """

    folder: Path
    precision: Precision = "BFLOAT16"
    is_reward: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a loaded model says of itself.

    Attributes:
        eos_token_ids: tokens that end its texts, by its files.
        device: kind of device that it is on, `cpu` or `cuda`.
    """

    eos_token_ids: frozenset[int]
    device: str


class Said(NamedTuple):
    """What one row of a request produced in a step, as `GenerationEvent` says it."""

    row: int
    token_ids: tuple[int, ...]
    num_generated: int
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Sequences whose chosen tokens are measured with an adapter; None: with the base model alone.

    `likeliest`: whether it is wanted too if each of them is the likeliest.
    """

    adapter: str | None
    sequences: Sequence[Sequence[int]]
    masks: Sequence[Sequence[bool]]
    likeliest: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Valued:
    """Sequences that are valued by a reward model's adapter; None: by a reward model with all its weights."""

    adapter: str | None
    sequences: Sequence[Sequence[int]]
