"""`linear_logprob` in C++ as a torch custom op.

A row's outputs depend on that row's hidden state alone, so that the gradient to it is one vector for each output,
computed during the forward pass and scaled in backward. Shape suffixes: N rows, D hidden size, V vocabulary.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from luthier.kernels.direct import kernel_op
from luthier.kernels.linear_cross_entropy import DEFAULT_BUDGET_BYTES
from luthier.kernels.linear_cross_entropy.cpu import HeadPass, head_pass


@kernel_op("luthier::linear_logprob")
def linear_logprob_op(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    softcap: float,
    want_entropy: bool,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log-probabilities [N], entropies [N], gradients of each [N, D]), float32; empty what is not wanted."""
    return log_probabilities(
        head_pass, (hidden_ND, weight_VD, target_N), softcap, want_entropy=want_entropy, need_grad=need_grad
    )


def log_probabilities(
    run: HeadPass,
    tensors: tuple[Tensor, Tensor, Tensor],
    softcap: float,
    *,
    want_entropy: bool,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op's outputs by a head pass in C++ or Triton."""
    hidden_ND = tensors[0]
    N, D = hidden_ND.shape
    shapes = {"loss": (N,), "grad_hidden": (N, D), "entropy": (N,), "grad_entropy": (N, D)}
    wanted = {"loss": True, "grad_hidden": need_grad, "entropy": want_entropy}
    wanted["grad_entropy"] = need_grad and want_entropy
    empty = partial(torch.empty, dtype=torch.float32, device=hidden_ND.device)
    outputs = {name: empty(shape) for name, shape in shapes.items() if wanted[name]}
    rows_N = torch.arange(N, device=hidden_ND.device)
    run((*tensors, None), rows_N, [softcap, 0.0, 0.0, float(DEFAULT_BUDGET_BYTES)], outputs)
    # The loss of a row is minus its log-probability.
    grad_ND = outputs["grad_hidden"].neg_() if need_grad else empty(0)
    entropy_N, grad_entropy_ND = (outputs.get(name, empty(0)) for name in ("entropy", "grad_entropy"))
    return outputs["loss"].neg_(), entropy_N, grad_ND, grad_entropy_ND


@linear_logprob_op.register_fake
def _(
    hidden_ND: Tensor,
    _weight_VD: Tensor,
    _target_N: Tensor,
    _softcap: float,
    want_entropy: bool,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    N, D = hidden_ND.shape
    shapes = [(N,), (N,) if want_entropy else (0,), (N, D) if need_grad else (0,)]
    shapes.append((N, D) if need_grad and want_entropy else (0,))
    first, second, third, fourth = (hidden_ND.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return first, second, third, fourth


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    if inputs[1].requires_grad:
        raise ValueError("our kernels need a frozen head, got weight.requires_grad=True")
    ctx.mark_non_differentiable(output[2], output[3])
    ctx.save_for_backward(output[2], output[3])
    ctx.dtype = inputs[0].dtype


def _backward(
    ctx: Any, grad_logprob_N: Tensor | None, grad_entropy_N: Tensor | None, *_others: Any
) -> tuple[Tensor | None, ...]:
    logprob_ND, entropy_ND = ctx.saved_tensors
    grad_ND = torch.zeros_like(logprob_ND) if grad_logprob_N is None else logprob_ND * grad_logprob_N[:, None]
    if entropy_ND.numel() and grad_entropy_N is not None:
        grad_ND = grad_ND + entropy_ND * grad_entropy_N[:, None]
    return grad_ND.to(ctx.dtype), None, None, None, None, None


linear_logprob_op.register_autograd(_backward, _keep)
