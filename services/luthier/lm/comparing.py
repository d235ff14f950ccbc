"""Whether two models compute the same: logits at positions of a few texts, and greedy answers.

Shape suffixes: N positions, T tokens of a text, V words.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from luthier.lm.read_tokenizer import Rows

_NUM_MADE_UP = 32
_NUM_PROMPT = 12
_NUM_GREEDY = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """What a model computes for the rows of a comparison.

    Attributes:
        logits: [N, V], float32, of all positions of all rows.
        greedy: the tokens with which it goes on from the beginning of each row.
    """

    logits: Tensor
    greedy: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How a model differs from the one that it was made from; attributes as in `luthier.v1.WeightsCheck`."""

    num_positions: int
    difference: float
    num_greedy_tokens: int
    num_equal_greedy_tokens: int


def comparison_rows(text_rows: Rows, num_words: int) -> Rows:
    """Return rows of tokens: those of some texts, and one that is made up, so that each tokenizer gives many tokens."""
    made_up = tuple((7919 * place + 5) % num_words for place in range(_NUM_MADE_UP))
    return (*text_rows, made_up)


@torch.no_grad()
def logits_of(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> Tensor:
    """Return the logits [N, V], float32, of all positions of some rows, one row after another."""
    return torch.cat([_logits(model, row) for row in rows])


@torch.no_grad()
def behaviour(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> Behaviour:
    """Return what a model computes for some rows."""
    greedy = []
    for row in rows:
        tokens = list(row[:_NUM_PROMPT])
        for _ in range(_NUM_GREEDY):
            tokens.append(int(_logits(model, tokens)[-1].argmax()))
        greedy.append(tuple(tokens[-_NUM_GREEDY:]))
    return Behaviour(logits=logits_of(model, rows), greedy=tuple(greedy))


def relative_difference(logits_NV: Tensor, reference_NV: Tensor) -> float:
    """Return the root mean square of the differences, in those of the reference around the mean of each position.

    Around the mean, as a number added to all logits of a position changes no probability.
    """
    spread = reference_NV - reference_NV.mean(dim=-1, keepdim=True)
    return float((logits_NV - reference_NV).double().norm() / spread.double().norm())


def compared(found: Behaviour, reference: Behaviour) -> Difference:
    """Return how what a model computes differs from what the one does that it was made from, for the same rows."""
    equal = 0
    for ours, theirs in zip(found.greedy, reference.greedy, strict=True):
        pairs = zip(ours, theirs, strict=True)
        equal += next((place for place, (one, other) in enumerate(pairs) if one != other), len(ours))
    return Difference(
        num_positions=len(reference.logits),
        difference=relative_difference(found.logits, reference.logits),
        num_greedy_tokens=sum(map(len, reference.greedy)),
        num_equal_greedy_tokens=equal,
    )


def _logits(model: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
    asked: Any = model
    ids_1T = torch.tensor([list(tokens)], device=model.device)
    logits: Tensor = asked(input_ids=ids_1T, use_cache=False).logits[0]
    return logits.float().cpu()
