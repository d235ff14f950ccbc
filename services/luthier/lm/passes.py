"""Passes of a model over caches: pieces of prompts, and the tokens that follow them, of several requests at once.

Shape suffixes: B rows, Q new columns of a cache, T new tokens of all rows, E hidden size, V vocabulary.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
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
from luthier.lm.joint_rows import CachedRows, JointRows, attends_in_one_call
from luthier.lm.long_angles import angles_by_row, turns_by_longest

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
    """What a pass computes: the columns of a cache behind those that it holds.

    Attributes:
        ids: tokens [B, Q]; anything in the columns before the first of a row.
        positions: of each of them in its sequence [B, Q].
        cache: takes their keys and values.
        prefix: keys and values that all of them see besides.
        head: makes logits of the last column; None: nobody wants them, or not yet.
        first: the column in which each row begins; empty: number 0.
        lengths: tokens of each row's sequence once what is being read has been; empty: up to the last column.
    """

    ids: Tensor
    positions: Tensor
    cache: BatchCache
    prefix: Prefix | None = None
    head: Head | None = plain_logits
    first: Sequence[int] = ()
    lengths: Sequence[int] = ()

    @property
    def num_tokens(self) -> int:
        """How many tokens of all rows it has."""
        return sum(self.rows.counts)

    @property
    def rows(self) -> CachedRows:
        """Its rows, as they attend."""
        begin, (num_rows, num_columns) = self.cache.get_seq_length(), self.ids.shape
        first = self.first or (0,) * num_rows
        return CachedRows(num_rows, self.cache, (begin, begin + num_columns), first, self.prefix)


def reads_tokens(model: PreTrainedModel) -> bool:
    """Whether passes compute tokens alone; else all columns of all rows, also before a row begins."""
    with rows_apart():
        return attends_in_one_call(_embedding(model))


def reads_beside(model: PreTrainedModel) -> bool:
    """Whether prompts and the tokens of others are one pass, which reads the weights once; else each goes alone."""
    return reads_tokens(model) and not turns_by_longest(model)


def forward_together(model: PreTrainedModel, passes: Sequence[Pass]) -> list[Tensor]:
    """Run several passes as one, which reads the weights once: the float32 logits [B, V] of each, empty without a head.

    On a processor the bits of each row are those that it has alone, and however its tokens are cut into passes: it
    attends to its own keys as it would alone, and what all tokens go through treats each by itself. Passes whose angles
    depend on the longest row go alone; so do those of several columns where C++ does not attend.
    """
    if len(passes) > 1 and turns_by_longest(model):
        return [forward_together(model, [one])[0] for one in passes]
    with rows_apart():
        joint = JointRows([one.rows for one in passes], _embedding(model))
        if not joint.is_one_call and (len(passes) == 1 or any(one.ids.shape[1] > 1 for one in passes)):
            return [_forward(model, one) for one in passes]
        if joint.is_one_call:
            ids_T1, positions_T1 = _tokens(joint, passes)
            if turns_by_longest(model):
                joint.angles = angles_by_row(model, positions_T1[:, 0], _lengths(joint, passes[0]))
        else:
            ids_T1, positions_T1 = (
                torch.cat(parts) for parts in zip(*(one[:2] for one in passes), strict=True)
            )
        hidden_TE = decode(model, ids_T1, positions_T1, joint)
        if hidden_TE is None:
            output = model.base_model(
                input_ids=ids_T1,
                position_ids=positions_T1,
                # Each part has its own; transformers makes none where it is given one of four dimensions.
                attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids_T1.device),
                use_cache=False,
                joint_rows=joint,
            )
            hidden_TE = output.last_hidden_state[:, -1]
        return _logits(model, passes, _last_tokens(joint, passes, hidden_TE))


def _embedding(model: PreTrainedModel) -> Tensor:
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight


def _forward(model: PreTrainedModel, one: Pass) -> Tensor:
    """Run a pass over all columns of all rows, each row a sequence: float32 logits [B, V] of the last column."""
    output = model.base_model(
        input_ids=one.ids,
        position_ids=one.positions,
        attention_mask=one.rows.visible(one.ids.device)[:, None],
        cache=one.cache,
        use_cache=True,
        shared_prefix=one.prefix,
    )
    hidden: Tensor = output.last_hidden_state[:, -1]
    return hidden.new_empty(0) if one.head is None else one.head(model, hidden)


def _tokens(joint: JointRows, passes: Sequence[Pass]) -> tuple[Tensor, Tensor]:
    """Tokens and positions of all passes, [T, 1] each, without columns before the first of a row."""
    ids, positions = [], []
    for part, one in zip(joint.parts, passes, strict=True):
        is_new_BQ = part.new_columns(one.ids.device)
        ids.append(one.ids.flatten() if is_new_BQ is None else one.ids[is_new_BQ])
        positions.append(one.positions.flatten() if is_new_BQ is None else one.positions[is_new_BQ])
    return torch.cat(ids)[:, None], torch.cat(positions)[:, None]


def _lengths(joint: JointRows, one: Pass) -> Tensor:
    """The length [T] of the row of each token of a pass."""
    lengths = one.lengths or [position + 1 for position in one.positions[:, -1].tolist()]
    (part,) = joint.parts
    return torch.tensor(lengths).repeat_interleave(torch.tensor(part.counts)).to(one.ids.device)


def _last_tokens(joint: JointRows, passes: Sequence[Pass], hidden_TE: Tensor) -> list[Tensor]:
    """Of each pass that has a head the hidden states [B, E] of each row's last token."""
    found, start = [], 0
    for part, one in zip(joint.parts, passes, strict=True):
        ends = list(accumulate(part.counts, initial=start))
        if one.head is None:
            found.append(hidden_TE[:0])
        else:
            assert all(part.counts), "a row without a token has no logits"
            found.append(hidden_TE[[end - 1 for end in ends[1:]]])
        start = ends[-1]
    return found


def _logits(model: PreTrainedModel, passes: Sequence[Pass], hidden: Sequence[Tensor]) -> list[Tensor]:
    """The logits of each pass; plain heads read their weights once."""
    found: dict[int, Tensor] = {}
    plain = [place for place, one in enumerate(passes) if one.head is plain_logits]
    if plain:
        together = plain_logits(model, torch.cat([hidden[place] for place in plain]))
        found.update(zip(plain, torch.split(together, [len(hidden[place]) for place in plain]), strict=True))
    for place, one in enumerate(passes):
        if place not in found:
            found[place] = hidden[place] if one.head is None else one.head(model, hidden[place])
    return [found[place] for place in range(len(passes))]
