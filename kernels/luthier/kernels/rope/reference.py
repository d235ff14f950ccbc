"""Eager reference of `rope`, in plain torch: any float dtype and device, gradients by autograd."""

import torch
from torch import Tensor


def rope_reference(x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """The first R elements of each head turned by its token's angles, halves rotated; the rest as it is."""
    rotary = cos_TR.shape[1]
    turned, rest = x_THD[..., :rotary], x_THD[..., rotary:]
    low, high = turned.chunk(2, dim=-1)
    out = turned * cos_TR[:, None] + torch.cat([-high, low], dim=-1) * sin_TR[:, None]
    return torch.cat([out, rest], dim=-1)
