"""How far one model's distributions of the next token lie from another's, all words counted, at chosen tokens.

The first model's distributions are kept in a file, since the other may be in another process, or loaded when the first
has gone. Shape suffixes: N positions that predict a chosen token, B of them at a time, V vocabulary, E hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from luthier.errors import InvalidArgument, Reason
from luthier.lm.attention import packed_forward
from luthier.lm.blocks import final_softcap
from luthier.lm.head import head_weight
from luthier.lm.packed import WEIGHT, named_positions, pack
from luthier.lm.score import SequenceDivergence

_POSITIONS = 32
_WORDS = 1 << 14


@torch.inference_mode()
def write_distributions(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], masks: Sequence[Sequence[bool]], path: Path
) -> None:
    """Write the logarithms of a model's probabilities of each word at each chosen token, [N, V] in float32, to a file.

    The first token of a sequence has none. Memory: the hidden states of all sequences, and 32 rows.
    """
    with path.open("wb") as file:
        for rows_BV in _distributions(model, sequences, masks):
            file.write(rows_BV.cpu().numpy().tobytes())


@torch.inference_mode()
def divergences(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], masks: Sequence[Sequence[bool]], path: Path
) -> list[SequenceDivergence]:
    """Return the Kullback-Leibler divergence of a model from the one whose distributions a file holds, by sequence.

    It is the sum over chosen tokens and words of p * (log p - log q), where p is the file's and q the model's.

    Raises:
        InvalidArgument: MODEL_INVALID, the file is of other tokens or another vocabulary.
    """
    counts = [sum(mask[1:]) for mask in masks]
    num_words = head_weight(model).shape[0]
    size = sum(counts) * num_words * 4
    if path.stat().st_size != size:
        raise InvalidArgument(
            f"distributions of {sum(counts)} tokens over {num_words} words must have {size} bytes, got "
            f"{path.stat().st_size}",
            reason=Reason.MODEL_INVALID,
        )
    if not sum(counts):
        return [SequenceDivergence(nats=0.0, num_tokens=0) for _ in counts]
    kept_NV = np.memmap(path, dtype=np.float32, mode="r", shape=(sum(counts), num_words))
    found: list[Tensor] = []
    first = 0
    for rows_BV in _distributions(model, sequences, masks):
        other_BV = torch.from_numpy(np.array(kept_NV[first : first + len(rows_BV)])).to(rows_BV.device)
        # A word that the first model thinks impossible adds nothing, whatever the other thinks of it.
        terms_BV = torch.where(other_BV.isinf(), 0.0, other_BV.exp() * (other_BV - rows_BV))
        found.append(terms_BV.double().sum(dim=-1).cpu())
        first += len(rows_BV)
    sums_N = torch.cat(found)
    ends = np.cumsum([0, *counts]).tolist()
    return [
        SequenceDivergence(nats=float(sums_N[start:end].sum()), num_tokens=end - start)
        for start, end in pairwise(ends)
    ]


def _distributions(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], masks: Sequence[Sequence[bool]]
) -> Iterator[Tensor]:
    """Yield logarithms of probabilities [B, V] in float32, position after position of all sequences in their order."""
    head_VE, softcap = head_weight(model), final_softcap(model)
    for ids, mask in zip(sequences, masks, strict=True):
        if not any(mask[1:]):
            continue
        batch = pack([ids], {WEIGHT: [mask]}).to(model.device)
        hidden = packed_forward(model, batch.input_ids, batch.position_ids, batch.cu_seqlens)
        for rows in torch.split(named_positions(batch, WEIGHT), _POSITIONS):
            yield torch.log_softmax(_logits(hidden[rows].float(), head_VE, softcap), dim=-1)


def _logits(hidden_BE: Tensor, head_VE: Tensor, softcap: float) -> Tensor:
    """Return logits of float32 products: what bfloat16 would round away is as large as a small divergence."""
    logits_BV = torch.cat([hidden_BE @ part.float().T for part in torch.split(head_VE, _WORDS)], dim=-1)
    return logits_BV if not softcap else softcap * torch.tanh(logits_BV / softcap)
