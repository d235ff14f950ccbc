"""Angles of models whose frequencies depend on how long a sequence is, for rows of several lengths in one pass.

Shape suffixes: T tokens, R turned elements of a head.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def turns_by_longest(model: PreTrainedModel) -> bool:
    """Whether the angles of all rows depend on the longest of a pass, as transformers has it for LongRoPE.

    Those of dynamic NTK do so beyond the model's context alone, which no request reaches.
    """
    kinds = getattr(getattr(model.base_model, "rotary_emb", None), "rope_type", "default")
    return "longrope" in (kinds.values() if isinstance(kinds, dict) else (kinds,))


def angles_by_row(
    model: PreTrainedModel, positions_T: Tensor, lengths_T: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines [T, R] of tokens, each as its own row's length has them; None where layers differ in kind.

    A length is that of what a row has to read or has come to, so that pieces of one prompt are turned alike.
    """
    rotary: Any = model.base_model.rotary_emb
    if isinstance(rotary.rope_type, dict):
        return None
    limit: int = rotary.config.rope_parameters["original_max_position_embeddings"]
    like = model.get_input_embeddings().weight
    is_long_T = lengths_T > limit
    found: dict[bool, tuple[Tensor, Tensor]] = {}
    for is_long in (False, True):
        # transformers looks at the greatest position: one beyond the limit stands for a length beyond it.
        positions = positions_T[is_long_T == is_long]
        asked = torch.cat([positions, positions.new_tensor([limit if is_long else 0])])
        cos, sin = rotary(like, asked[None])
        found[is_long] = cos[0, :-1], sin[0, :-1]
    both = []
    for short, long in zip(found[False], found[True], strict=True):
        one = short.new_empty(len(positions_T), short.shape[1])
        one[~is_long_T], one[is_long_T] = short, long
        both.append(one)
    return both[0], both[1]
