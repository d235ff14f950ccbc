"""The supervised loss of a packed batch: only positions with a label reach the vocabulary matmul.

Shape suffixes: T tokens, S sequences, N labelled positions, E hidden size.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from luthier.errors import InvalidArgument, Reason
from luthier.kernels.linear_cross_entropy import LossOptions, linear_cross_entropy
from luthier.kernels.tables import Impl
from luthier.lm.attention import head_weight, packed_forward
from luthier.lm.blocks import final_softcap
from luthier.lm.packed import PackedBatch


def supervised_loss(model: PreTrainedModel, batch: PackedBatch, *, impl: Impl = "auto") -> tuple[Tensor, int]:
    """Summed cross-entropy (float32 scalar, natural log) of the supervised tokens, and how many they are.

    A caller divides by the count of its whole step, over all micro-batches, so that the gradient does not
    depend on how the step was cut. The first token of a sequence has nothing before it to predict it and is
    never counted. `impl` chooses the implementation of the loss op; "auto" goes by its measured table.

    Raises:
        InvalidArgument: no token of the batch can be supervised (reason NO_SUPERVISED_TOKENS).
    """
    rows_N = labelled_rows(batch)
    if rows_N.numel() == 0:
        raise InvalidArgument(
            f"a batch must have a supervised token after the first of a sequence, got none in "
            f"{len(batch.cu_seqlens) - 1} sequences",
            reason=Reason.NO_SUPERVISED_TOKENS,
        )
    hidden_TE = packed_forward(model, batch.input_ids, batch.position_ids, batch.cu_seqlens)
    target_N = batch.input_ids[rows_N + 1]
    options = LossOptions(softcap=final_softcap(model))
    return linear_cross_entropy(hidden_TE[rows_N], head_weight(model), target_N, options=options, impl=impl)


def labelled_rows(batch: PackedBatch) -> Tensor:
    """Positions [N] whose next token, in the same sequence, is supervised; ascending."""
    next_supervised = torch.zeros_like(batch.supervised)
    next_supervised[:-1] = batch.supervised[1:]
    last = torch.tensor(batch.cu_seqlens[1:], device=next_supervised.device) - 1
    next_supervised[last] = False
    return next_supervised.nonzero().squeeze(1)
