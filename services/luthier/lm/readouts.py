"""What is taken from a model's last hidden states: a loss, log-probabilities, or a value for each sequence.

Shape suffixes: T tokens, S sequences, N positions that predict a named token, E hidden size.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from luthier.errors import InvalidArgument, Reason
from luthier.kernels.linear import linear
from luthier.kernels.linear_cross_entropy import LossOptions, LossSum, linear_cross_entropy
from luthier.kernels.linear_logprob import linear_logprob
from luthier.kernels.tables import Impl
from luthier.lm.attention import packed_forward
from luthier.lm.blocks import final_softcap
from luthier.lm.head import head_weight
from luthier.lm.packed import WEIGHT, PackedBatch, named_positions

_ROWS_PER_MATMUL = 512

ReadT = TypeVar("ReadT")
ReadT_co = TypeVar("ReadT_co", covariant=True)


class Readout(Protocol[ReadT_co]):
    """Takes something from the hidden states [T, E] that a model has after its last norm."""

    def __call__(self, model: PreTrainedModel, hidden_TE: Tensor, batch: PackedBatch, /) -> ReadT_co:
        """Return what is taken; differentiable in the hidden states and in what the readout itself trains."""
        ...


def read(model: PreTrainedModel, batch: PackedBatch, readout: Readout[ReadT]) -> ReadT:
    """One forward pass and what the readout takes from its end.

    Both are one call, as the head of a model that is divided among ranks is whole only inside its forward pass.
    """
    hidden_TE = packed_forward(model, batch.input_ids, batch.position_ids, batch.cu_seqlens)
    return readout(model, hidden_TE, batch)


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedLoss:
    """Summed cross-entropy (float32 scalar, nats) of the tokens that a stream names, each times its value there.

    Only their positions reach the vocabulary matmul, and no log-probability is kept. A caller divides by the count of
    its whole step, over all micro-batches, so that the gradient does not depend on how the step was cut. `impl`
    chooses the implementation of the loss op; "auto" goes by its measured table.
    """

    stream: str = WEIGHT
    impl: Impl = "auto"

    def __call__(self, model: PreTrainedModel, hidden_TE: Tensor, batch: PackedBatch) -> LossSum:
        """Return the sum, and how many tokens it is over.

        Raises:
            InvalidArgument: the stream names no token that can be predicted (reason NO_SUPERVISED_TOKENS).
        """
        rows_N = _positions(batch, self.stream)
        weight_N = batch.streams[self.stream][rows_N + 1]
        return linear_cross_entropy(
            hidden_TE[rows_N],
            head_weight(model),
            batch.input_ids[rows_N + 1],
            token_weight_N=weight_N if bool((weight_N != 1).any()) else None,
            options=LossOptions(softcap=final_softcap(model)),
            impl=self.impl,
        )


class LossAndHits(NamedTuple):
    """The fused loss of some tokens, and how many of them (int64 scalar) are the likeliest at their position."""

    loss: LossSum
    num_hits: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedLossAndHits:
    """What `FusedLoss` takes, and how often the model is right: with one more matmul, 512 positions at a time.

    For validations: the fused loss forms no logits, so that counting makes a step slower.
    """

    stream: str = WEIGHT
    impl: Impl = "auto"

    def __call__(self, model: PreTrainedModel, hidden_TE: Tensor, batch: PackedBatch) -> LossAndHits:
        """Return both; of tokens that are equally likely the first is the likeliest.

        Raises:
            InvalidArgument: the stream names no token that can be predicted (reason NO_SUPERVISED_TOKENS).
        """
        loss = FusedLoss(stream=self.stream, impl=self.impl)(model, hidden_TE, batch)
        rows_N = _positions(batch, self.stream)
        head_VE = head_weight(model)
        # A cap rises with what it caps, and changes no order.
        hits = [
            (linear(hidden_TE[rows], head_VE).argmax(dim=1) == batch.input_ids[rows + 1]).sum()
            for rows in torch.split(rows_N, _ROWS_PER_MATMUL)
        ]
        return LossAndHits(loss, torch.stack(hits).sum())


class TokenScores(NamedTuple):
    """Of N tokens: the position before each, the float32 log-probability of each and the entropy there in nats."""

    position: Tensor
    logprob: Tensor
    entropy: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Log-probabilities, and where asked for entropies, of the tokens that one of the streams names.

    They are those of the logits divided by `temperature`, from which tokens are drawn (`lm.sampling`); with `is_wide`
    the logits are summed in float32 whatever computes them, as they are where tokens are drawn.
    """

    streams: tuple[str, ...] = (WEIGHT,)
    want_entropy: bool = False
    temperature: float = 1.0
    is_wide: bool = False
    impl: Impl = "auto"

    def __call__(self, model: PreTrainedModel, hidden_TE: Tensor, batch: PackedBatch) -> TokenScores:
        """Return the scores, in the order of the tokens.

        Raises:
            InvalidArgument: the streams name no token that can be predicted (reason NO_SUPERVISED_TOKENS).
        """
        rows_N = _positions(batch, *self.streams)
        hidden_NE = hidden_TE[rows_N]
        logprob_N, entropy_N = linear_logprob(
            hidden_NE if self.temperature == 1 else hidden_NE / self.temperature,
            head_weight(model),
            batch.input_ids[rows_N + 1],
            softcap=final_softcap(model) / self.temperature,
            want_entropy=self.want_entropy,
            is_wide=self.is_wide,
            impl=self.impl,
        )
        return TokenScores(rows_N, logprob_N, entropy_N)


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceValues:
    """A value [S] at the last token of each sequence: its hidden state times `head` ([E] or [1, E]), in float32.

    The head belongs to the caller, who trains it or not.
    """

    head: Tensor

    def __call__(self, _model: PreTrainedModel, hidden_TE: Tensor, batch: PackedBatch) -> Tensor:
        """Return the values, in the order of the sequences; nothing of the model is read."""
        last_S = torch.tensor(batch.cu_seqlens[1:], device=hidden_TE.device) - 1
        return hidden_TE[last_S].float() @ self.head.flatten().float()


def _positions(batch: PackedBatch, *streams: str) -> Tensor:
    rows_N = named_positions(batch, *streams)
    if rows_N.numel() == 0:
        raise InvalidArgument(
            f"a batch must have a supervised token after the first of a sequence, got none in "
            f"{len(batch.rows)} sequences",
            reason=Reason.NO_SUPERVISED_TOKENS,
        )
    return rows_N
