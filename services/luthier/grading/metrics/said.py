"""What an arm said to one record, as far as metrics look at it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """An answer beside its reference, what it cost, and what the arm finds of given texts.

    Attributes:
        text: the answer.
        reference: the right answer.
        num_tokens: tokens of the answer.
        num_prompt_tokens: tokens before it.
        is_ended: whether the arm ended it itself.
        sides: log-probabilities in nats of a pair's chosen and rejected answer; empty: not measured.
        choices: the texts between which the arm chooses.
        choice_logprobs: their log-probabilities in nats; empty: not measured.
        reward: what a reward model values the answer at; None: nobody did, or at no finite number.
    """

    text: str
    reference: str
    num_tokens: int = 0
    num_prompt_tokens: int = 0
    is_ended: bool = True
    sides: Sequence[float] = ()
    choices: Sequence[str] = ()
    choice_logprobs: Sequence[float] = ()
    reward: float | None = None
