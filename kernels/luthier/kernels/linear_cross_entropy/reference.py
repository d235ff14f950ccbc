"""Eager reference of `linear_cross_entropy`, in plain torch: any dtype and device, head frozen or not."""

import torch
from torch import Tensor, nn


def linear_cross_entropy_reference(
    hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, ignore_index: int = -100
) -> Tensor:
    """Summed cross-entropy over rows whose target is not `ignore_index`; float32, or float64 for float64 inputs.

    Memory: the logits of all counted rows, in the input's dtype and again in float32.
    """
    counted = target_N != ignore_index
    logits_MV = nn.functional.linear(hidden_ND[counted], weight_VD)
    if logits_MV.dtype != torch.float64:
        logits_MV = logits_MV.float()
    return nn.functional.cross_entropy(logits_MV, target_N[counted], reduction="sum")
