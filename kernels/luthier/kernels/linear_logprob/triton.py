"""`linear_logprob` in Triton, by the head pass of the loss. Shape suffixes: N rows, D hidden size, V vocabulary."""

from torch import Tensor

from luthier.kernels.linear_cross_entropy.triton import head_pass_triton
from luthier.kernels.linear_logprob.cpu import linear_logprob_op, log_probabilities


@linear_logprob_op.on_gpu
def linear_logprob_triton(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    softcap: float,
    want_entropy: bool,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log-probabilities [N], entropies [N], gradients of each [N, D]), as the C++ kernel."""
    return log_probabilities(
        head_pass_triton,
        (hidden_ND, weight_VD, target_N),
        softcap,
        want_entropy=want_entropy,
        need_grad=need_grad,
    )
