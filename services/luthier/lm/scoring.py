"""Log-probabilities of given tokens, for perplexity, and the values of a reward model.

Shape suffixes: T tokens, N positions that predict a chosen token, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from transformers import PreTrainedModel

from luthier.errors import InvalidArgument
from luthier.kernels.linear_logprob import linear_logprob
from luthier.kernels.tables import rows_apart
from luthier.lm.attention import packed_forward
from luthier.lm.blocks import final_softcap
from luthier.lm.head import head_weight, output_head
from luthier.lm.packed import WEIGHT, named_positions, pack
from luthier.lm.readouts import SequenceValues, read
from luthier.lm.score import SequenceScore

_ROWS_PER_MATMUL = 512


@torch.inference_mode()
def sequence_logprobs(
    model: PreTrainedModel,
    sequences: Sequence[Sequence[int]],
    masks: Sequence[Sequence[bool]],
    *,
    max_tokens: int = 4096,
    likeliest: bool = False,
) -> list[SequenceScore]:
    """Score the tokens that `masks` choose, with the active adapter, in the order of `sequences`.

    The first token of a sequence cannot be scored and is not counted. Sequences are packed into batches of
    up to `max_tokens` tokens (one longer sequence is a batch of its own); logits are made for 512 positions
    at a time, if at all. With `likeliest` each score says whether its tokens are the likeliest; that takes logits.
    On a processor a sequence has the bits that it has alone, whatever it is packed with.

    Raises:
        InvalidArgument: the counts of sequences and masks, or of tokens and flags, differ; a sequence is
        empty.
    """
    if len(sequences) != len(masks):
        raise InvalidArgument(
            f"there must be one mask for each sequence, got {len(masks)} for {len(sequences)}"
        )
    scores: list[SequenceScore] = []
    with rows_apart():
        for start, end in _batches([len(ids) for ids in sequences], max_tokens):
            scores += _score(model, sequences[start:end], masks[start:end], likeliest)
    return scores


@torch.inference_mode()
def sequence_values(model: PreTrainedModel, head: Tensor, sequences: Sequence[Sequence[int]]) -> list[float]:
    """Return what a reward model's head [1, E], with the active adapter, makes of the last token of each sequence.

    Each goes through the model alone, so that its value has the same bits whatever else is valued. It may not be
    finite.

    Raises:
        InvalidArgument: a sequence is empty.
    """
    values = []
    for ids in sequences:
        batch = pack([ids], {}).to(model.device)
        values.append(float(read(model, batch, SequenceValues(head=head))[0]))
    return values


def _batches(lengths: Sequence[int], max_tokens: int) -> Iterator[tuple[int, int]]:
    start = used = 0
    for index, length in enumerate(lengths):
        if used and used + length > max_tokens:
            yield start, index
            start, used = index, 0
        used += length
    if used or start < len(lengths):
        yield start, len(lengths)


def _score(
    model: PreTrainedModel,
    sequences: Sequence[Sequence[int]],
    masks: Sequence[Sequence[bool]],
    likeliest: bool,
) -> list[SequenceScore]:
    batch = pack(sequences, {WEIGHT: masks}).to(model.device)
    rows_N = named_positions(batch, WEIGHT)
    hidden = packed_forward(model, batch.input_ids, batch.position_ids, batch.cu_seqlens)
    head_VE, softcap = head_weight(model), final_softcap(model)
    parts = [
        linear_logprob(hidden[rows], head_VE, batch.input_ids[rows + 1], softcap=softcap).logprob
        for rows in torch.split(rows_N, _ROWS_PER_MATMUL)
    ]
    logprob_N = torch.cat(parts).double()
    is_greedy_N = _is_likeliest(model, hidden, rows_N, batch.input_ids) if likeliest else None
    ends = torch.searchsorted(rows_N, torch.tensor(batch.cu_seqlens, device=rows_N.device)).tolist()
    return [
        SequenceScore(
            logprob=float(logprob_N[first:last].sum()),
            num_tokens=last - first,
            is_greedy=None if is_greedy_N is None else bool(is_greedy_N[first:last].all()),
        )
        for first, last in pairwise(ends)
    ]


def _is_likeliest(model: PreTrainedModel, hidden_TE: Tensor, rows_N: Tensor, ids_T: Tensor) -> Tensor:
    """Tell of each row whether the token behind it is the likeliest; a cap of logits keeps their order."""
    head = output_head(model)
    assert head is not None, "a language model makes logits"
    parts = [
        head(hidden_TE[rows]).argmax(dim=-1) == ids_T[rows + 1]
        for rows in torch.split(rows_N, _ROWS_PER_MATMUL)
    ]
    return torch.cat(parts)
