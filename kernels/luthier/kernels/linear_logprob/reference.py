"""Eager reference of `linear_logprob`, in plain torch: any float dtype and device, gradients by autograd."""

from torch import Tensor

from luthier.kernels.linear_cross_entropy.reference import head_logits


def linear_logprob_reference(
    hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, softcap: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the targets and entropies in nats, [N] each; memory: several times the logits."""
    logprobs_NV = head_logits(hidden_ND, weight_VD, None, softcap).log_softmax(dim=1)
    entropy_N = -(logprobs_NV.exp() * logprobs_NV).sum(dim=1)
    return logprobs_NV.gather(1, target_N[:, None]).squeeze(1), entropy_N
