"""Log-probabilities of given tokens as each engine computes them: packed, over a cache, or plainly.

Shape suffixes: T tokens, N tokens that are scored, V words.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from luthier.lm.cache import BatchCache
from luthier.lm.made import HeldOutRow
from luthier.lm.passes import Pass, forward_together, scaled_logits


@torch.no_grad()
def sampler_logprobs(model: PreTrainedModel, row: HeldOutRow) -> list[float]:
    """Return what generation finds of a row's tokens: all before the first wanted one are read at once, as a prompt is.

    Each of the others is fed after the one before, over a cache.
    """
    if not row.positions:
        return []
    ids_1T = torch.tensor([row.token_ids], device=model.device)
    cache = BatchCache(model.config.num_hidden_layers, len(row.token_ids))
    wanted, found = frozenset(row.positions), []
    begin = 0
    for end in range(min(wanted), max(wanted) + 1):
        columns = torch.arange(begin, end, device=model.device)[None]
        one = Pass(ids_1T[:, begin:end], columns, cache, head=_logits)
        (logits_1V,) = forward_together(model, [one])
        if end in wanted:
            found.append(_logprob(logits_1V[0], row.token_ids[end]))
        begin = end
    return found


@torch.no_grad()
def plain_logprobs(model: PreTrainedModel, rows: Sequence[HeldOutRow]) -> tuple[float, ...]:
    """Return what a model finds of the tokens of all rows, one row after another, in the type that it computes in."""
    asked: Any = model
    found = []
    for row in rows:
        ids_1T = torch.tensor([row.token_ids], device=model.device)
        logits_TV = asked(input_ids=ids_1T, use_cache=False).logits[0].float()
        found += [_logprob(logits_TV[place - 1], row.token_ids[place]) for place in row.positions]
    return tuple(found)


def _logits(model: PreTrainedModel, hidden_BE: Tensor) -> Tensor:
    return scaled_logits(model, hidden_BE, temperature=1.0)


def _logprob(logits_V: Tensor, token: int) -> float:
    return float(torch.log_softmax(logits_V.double(), dim=-1)[token])
