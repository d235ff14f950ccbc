"""Passes of a model over caches: of one request, or of the next tokens of several at once.

Shape suffixes: B rows, Q queries, K keys, E hidden size, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from luthier.kernels.linear import wide_linear
from luthier.kernels.tables import rows_apart
from luthier.lm.blocks import final_softcap
from luthier.lm.cache import BatchCache, Prefix
from luthier.lm.decode_program import decode
from luthier.lm.head import head_weight, output_head
from luthier.lm.joint_rows import CachedRows, JointRows

Head = Callable[[PreTrainedModel, Tensor], Tensor]
"""Makes float32 logits [B, V] of hidden states [B, E]."""


def plain_logits(model: PreTrainedModel, hidden_BE: Tensor) -> Tensor:
    """Logits as the model's own head makes them, in its type."""
    head = output_head(model)
    assert head is not None, "a language model makes logits"
    logits: Tensor = head(hidden_BE).float()
    cap = final_softcap(model)
    return torch.tanh(logits / cap) * cap if cap else logits


def scaled_logits(model: PreTrainedModel, hidden_BE: Tensor, *, temperature: float) -> Tensor:
    """Logits divided by a temperature, summed in float32 as our kernels sum those that are learnt.

    Rounded to bfloat16, as a head's product is, a logit of 16 would be off by up to 1/16, and so would be the ratio of
    what is learnt to what was drawn from.
    """
    logits_BV = wide_linear(hidden_BE / temperature, head_weight(model))
    cap = final_softcap(model) / temperature
    return torch.tanh(logits_BV / cap) * cap if cap else logits_BV


class Pass(NamedTuple):
    """What a pass computes.

    Attributes:
        ids: tokens [B, Q].
        positions: of each of them in its sequence [B, Q].
        visible: which keys each of them sees [B, Q, K], those of `cache` with its own behind them.
        cache: takes their keys and values.
        prefix: keys and values that all of them see besides.
        head: makes logits of the last column.
        first: the first of its own keys that each row sees, of which `visible` tells the same; empty: number 0.
    """

    ids: Tensor
    positions: Tensor
    visible: Tensor
    cache: BatchCache
    prefix: Prefix | None = None
    head: Head = plain_logits
    first: Sequence[int] = ()


def forward(model: PreTrainedModel, one: Pass) -> Tensor:
    """Run a pass: float32 logits [B, V] of the last column."""
    output = model.base_model(
        input_ids=one.ids,
        position_ids=one.positions,
        attention_mask=one.visible[:, None],
        cache=one.cache,
        use_cache=True,
        shared_prefix=one.prefix,
    )
    return one.head(model, output.last_hidden_state[:, -1])


def forward_together(model: PreTrainedModel, passes: Sequence[Pass]) -> list[Tensor]:
    """Run several passes of one token a row as one, which reads the weights once: the logits of each.

    On a processor the bits of each are those that it has alone: its rows attend to their own keys as they would alone,
    and what all rows go through treats every row by itself. Passes whose angles depend on the longest row go alone.
    """
    if len(passes) > 1 and _turns_by_longest(model):
        return [forward_together(model, [one])[0] for one in passes]
    with rows_apart():
        joint = JointRows([_cached_rows(one) for one in passes])
        if len(passes) == 1 and not joint.is_one_call:
            return [forward(model, passes[0])]
        ids, positions = (torch.cat(parts) for parts in zip(*(one[:2] for one in passes), strict=True))
        hidden = decode(model, ids, positions, joint)
        if hidden is None:
            output = model.base_model(
                input_ids=ids,
                position_ids=positions,
                # Each part has its own; transformers makes none where it is given one of four dimensions.
                attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device),
                use_cache=False,
                joint_rows=joint,
            )
            hidden = output.last_hidden_state[:, -1]
        return _logits(model, passes, hidden.split([len(one.ids) for one in passes]))


def _turns_by_longest(model: PreTrainedModel) -> bool:
    """Whether the angles of all rows depend on the longest of a pass, as transformers has it for LongRoPE.

    Those of dynamic NTK do so beyond the model's context alone, which no request reaches.
    """
    kinds = getattr(getattr(model.base_model, "rotary_emb", None), "rope_type", "default")
    return "longrope" in (kinds.values() if isinstance(kinds, dict) else (kinds,))


def _cached_rows(one: Pass) -> CachedRows:
    num_rows = len(one.ids)
    return CachedRows(num_rows, one.cache, one.visible, one.first or (0,) * num_rows, one.prefix)


def _logits(model: PreTrainedModel, passes: Sequence[Pass], hidden: Sequence[Tensor]) -> list[Tensor]:
    """The logits of each pass; plain heads read their weights once."""
    found: dict[int, Tensor] = {}
    plain = [place for place, one in enumerate(passes) if one.head is plain_logits]
    if plain:
        together = plain_logits(model, torch.cat([hidden[place] for place in plain]))
        found.update(zip(plain, torch.split(together, [len(hidden[place]) for place in plain]), strict=True))
    for place, one in enumerate(passes):
        if place not in found:
            found[place] = one.head(model, hidden[place])
    return [found[place] for place in range(len(passes))]
