"""Log-probabilities and entropies of a linear head, row by row, without the logits of the whole batch.

Shape suffixes: N rows, D hidden size, V vocabulary. Importing this package does not import torch.
"""

from typing import TYPE_CHECKING, NamedTuple

from luthier.kernels.linear_cross_entropy import check_head, head_refusal, is_trained, shape_class
from luthier.kernels.tables import Impl, resolve

if TYPE_CHECKING:
    from torch import Tensor


class LogProbabilities(NamedTuple):
    """Float32 [N] each: the log-probability of each row's target and, where asked for, the row's entropy in nats."""

    logprob: "Tensor"
    entropy: "Tensor | None"


def linear_logprob(
    hidden_ND: "Tensor",
    weight_VD: "Tensor",
    target_N: "Tensor",
    *,
    softcap: float = 0.0,
    want_entropy: bool = False,
    is_wide: bool = False,
    impl: Impl = "auto",
) -> LogProbabilities:
    """Log softmax(u)[target] and its entropy for every row, differentiable in both matrices; u as in LossOptions.

    What losses over log-probabilities (DPO, GRPO and others) are built from. `cpu` (C++; bfloat16 or float32) never
    holds the logits of a frozen head, and a row's bits depend neither on the number of threads nor on the other rows;
    `eager` is plain torch. Where logits are held and would take more than the default budget of the loss, it is in
    chunks of rows. `auto` takes what the committed table measured as faster. C++ sums logits in float32; eager rounds
    them to the inputs' type, or with `is_wide` does not either.

    Raises:
        ValueError: shapes, dtypes, devices or targets do not fit, or `impl` cannot run on them.
    """
    check_head(hidden_ND, weight_VD, target_N)
    if softcap < 0:
        raise ValueError(f"softcap must be at least 0, got {softcap}")
    if target_N.numel() and not (int(target_N.min()) >= 0 and int(target_N.max()) < weight_VD.shape[0]):
        raise ValueError(
            f"targets must lie in [0, {weight_VD.shape[0]}), got {int(target_N.min())}..{int(target_N.max())}"
        )
    kind = hidden_ND.device.type
    shape = shape_class(target_N.numel(), weight_VD.shape[0], kind, is_trained=is_trained(weight_VD))
    refusal = head_refusal(impl, hidden_ND, weight_VD, None)
    chosen = resolve("linear_logprob", impl, refusal, hidden_ND, shape)
    if chosen == "eager":
        from luthier.kernels.linear_logprob.reference import (
            as_wide,
            chunked_logprob,
            linear_logprob_reference,
        )

        eager = chunked_logprob if refusal is None else linear_logprob_reference
        if is_wide:
            hidden_ND, weight_VD = as_wide(hidden_ND), as_wide(weight_VD)
        logprob_N, entropy_N = eager(hidden_ND, weight_VD, target_N, softcap)
        return LogProbabilities(logprob_N, entropy_N if want_entropy else None)
    if is_trained(weight_VD):
        from luthier.kernels.linear.cpu import project
        from luthier.kernels.linear_logprob.reference import chunked_logprob

        logprob_N, entropy_N = chunked_logprob(hidden_ND, weight_VD, target_N, softcap, project)
        return LogProbabilities(logprob_N, entropy_N if want_entropy else None)
    import torch

    from luthier.kernels.direct import run
    from luthier.kernels.linear_logprob.cpu import linear_logprob_op

    need_grad = torch.is_grad_enabled() and hidden_ND.requires_grad
    given = (hidden_ND, weight_VD, target_N, softcap, want_entropy, need_grad)
    logprob_N, entropy_N, *_ = run(chosen, linear_logprob_op, *given)
    return LogProbabilities(logprob_N, entropy_N if want_entropy else None)
