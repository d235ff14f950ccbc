"""Eager reference of `linear_logprob`, in plain torch: any float dtype and device, gradients by autograd."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from luthier.kernels.linear_cross_entropy import BYTES_OF_LOGIT, DEFAULT_BUDGET_BYTES
from luthier.kernels.linear_cross_entropy.reference import Project, head_logits


def as_wide(x: Tensor) -> Tensor:
    """The tensor in at least float32; gradients come back in its own type."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def linear_logprob_reference(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    softcap: float,
    project: Project = nn.functional.linear,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the targets and entropies in nats, [N] each; memory: several times the logits."""
    logprobs_NV = head_logits(hidden_ND, weight_VD, None, softcap, project).log_softmax(dim=1)
    entropy_N = -(logprobs_NV.exp() * logprobs_NV).sum(dim=1)
    return logprobs_NV.gather(1, target_N[:, None]).squeeze(1), entropy_N


def chunked_logprob(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    softcap: float,
    project: Project = nn.functional.linear,
) -> tuple[Tensor, Tensor]:
    """What the reference computes; where all logits exceed the budget, in chunks that backward computes again."""
    size = max(1, DEFAULT_BUDGET_BYTES // (BYTES_OF_LOGIT * weight_VD.shape[0]))
    if hidden_ND.shape[0] <= size:
        return linear_logprob_reference(hidden_ND, weight_VD, target_N, softcap, project)
    chunks = [
        checkpoint(
            linear_logprob_reference,
            *(hidden_CD, weight_VD, target_C, softcap, project),
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for hidden_CD, target_C in zip(torch.split(hidden_ND, size), torch.split(target_N, size), strict=True)
    ]
    logprobs, entropies = zip(*chunks, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)
