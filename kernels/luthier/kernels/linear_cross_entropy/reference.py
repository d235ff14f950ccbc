"""Eager references of the loss of a linear head, in plain torch: any float dtype and device, any head.

Shape suffixes: N rows, M counted rows, D hidden size, V vocabulary, R rank.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from luthier.kernels.linear_cross_entropy import BYTES_OF_LOGIT, HeadUpdate, LossOptions

Project = Callable[[Tensor, Tensor], Tensor]
"""Rows [M, D] and the head's weight [V, D] -> [M, V], differentiable in both: torch's linear layer, or a kernel."""


def head_logits(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    update: HeadUpdate | None,
    softcap: float,
    project: Project = nn.functional.linear,
) -> Tensor:
    """Scores [M, V] in at least float32, capped where softcap is not 0."""
    logits_MV = project(hidden_MD, weight_VD)
    if update is not None:
        low_MR = nn.functional.linear(hidden_MD, update.a.to(hidden_MD.dtype))
        logits_MV = logits_MV + update.scale * nn.functional.linear(low_MR, update.b.to(hidden_MD.dtype))
    wide_MV = logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32))
    return torch.tanh(wide_MV / softcap) * softcap if softcap else wide_MV


def linear_cross_entropy_reference(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    token_weight_N: Tensor | None,
    update: HeadUpdate | None,
    options: LossOptions,
    project: Project = nn.functional.linear,
) -> Tensor:
    """Summed loss over rows whose target counts; float32, or float64 for float64 inputs.

    Memory: the logits of all counted rows, in the input's dtype and again in float32.
    """
    counted = target_N != options.ignore_index
    logits_MV = head_logits(hidden_ND[counted], weight_VD, update, options.softcap, project)
    target_M = target_N[counted]
    smoothing = options.label_smoothing
    if token_weight_N is None and not options.z_loss:
        return nn.functional.cross_entropy(logits_MV, target_M, reduction="sum", label_smoothing=smoothing)
    loss_M = nn.functional.cross_entropy(logits_MV, target_M, reduction="none", label_smoothing=smoothing)
    if options.z_loss:
        loss_M = loss_M + options.z_loss * logits_MV.logsumexp(dim=1).square()
    return (loss_M if token_weight_N is None else loss_M * token_weight_N[counted].to(loss_M.dtype)).sum()


class _ChunkedLoss(torch.autograd.Function):
    """Gradients are formed chunk by chunk during the forward pass, those of head and update summed in float32."""

    @staticmethod
    def forward(
        ctx: Any, rows: tuple[Any, ...], hidden_ND: Tensor, weight_VD: Tensor, *factors: Tensor
    ) -> Tensor:
        target_N, token_weight_N, scale, options, project = rows
        leaves = [weight_VD, *factors]
        wide = torch.promote_types(hidden_ND.dtype, torch.float32)
        needs = ctx.needs_input_grad[1:]
        sums = [
            torch.zeros_like(leaf, dtype=wide) if need else None
            for leaf, need in zip(leaves, needs[1:], strict=True)
        ]
        grad_ND = torch.zeros_like(hidden_ND) if needs[0] else None
        total = hidden_ND.new_zeros((), dtype=wide)
        rows_M = (target_N != options.ignore_index).nonzero().squeeze(1)
        size = max(1, options.budget_bytes // (BYTES_OF_LOGIT * weight_VD.shape[0]))
        for index_C in rows_M.split(size):
            loss, grads = _chunk_gradients(
                [hidden_ND[index_C], *leaves],
                needs,
                target_N[index_C],
                None if token_weight_N is None else token_weight_N[index_C],
                (scale, options, project),
            )
            total += loss
            for total_grad, grad in zip(sums, grads[1:], strict=True):
                if total_grad is not None and grad is not None:
                    total_grad.add_(grad)
            if grad_ND is not None and grads[0] is not None:
                grad_ND[index_C] = grads[0]
        ctx.save_for_backward(grad_ND, *sums)
        ctx.dtypes = [leaf.dtype for leaf in leaves]
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        grad_ND, *sums = ctx.saved_tensors
        scaled = [
            None if one is None else (one * grads[0]).to(dtype)
            for one, dtype in zip(sums, ctx.dtypes, strict=True)
        ]
        return None, None if grad_ND is None else (grad_ND * grads[0]).to(grad_ND.dtype), *scaled


def _chunk_gradients(
    tensors: list[Tensor],
    needs: tuple[bool, ...],
    target_C: Tensor,
    token_weight_C: Tensor | None,
    how: tuple[float, LossOptions, Project],
) -> tuple[Tensor, list[Tensor | None]]:
    """Loss of one chunk and its gradients to (hidden, weight, update's a and b), None where not needed."""
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_(need) for tensor, need in zip(tensors, needs, strict=True)]
        scale, options, project = how
        update = HeadUpdate(leaves[2], leaves[3], scale) if len(leaves) == 4 else None
        loss = linear_cross_entropy_reference(
            leaves[0], leaves[1], target_C, token_weight_C, update, options, project
        )
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        found = iter(torch.autograd.grad(loss, wanted) if wanted else ())
    return loss.detach(), [next(found) if leaf.requires_grad else None for leaf in leaves]


def chunked_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    token_weight_N: Tensor | None,
    update: HeadUpdate | None,
    options: LossOptions,
    project: Project = nn.functional.linear,
) -> Tensor:
    """What the reference computes, in chunks of rows whose logits take at most `options.budget_bytes`.

    Memory: the budget, and float32 gradients of what is trained. First derivatives only.
    """
    factors = () if update is None else (update.a, update.b)
    rows = (target_N, token_weight_N, 0.0 if update is None else update.scale, options, project)
    loss: Tensor = _ChunkedLoss.apply(rows, hidden_ND, weight_VD, *factors)  # type: ignore[no-untyped-call]
    return loss
