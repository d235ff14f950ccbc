"""Eager reference of `rms_norm`, in plain torch: any float dtype and device, gradients by autograd."""

import torch
from torch import Tensor


def rms_norm_reference(x_MD: Tensor, weight_D: Tensor, epsilon: float, offset: float) -> Tensor:
    """X / sqrt(mean(x^2) + epsilon) * (weight + offset), computed in at least float32."""
    wide_MD = x_MD.to(torch.promote_types(x_MD.dtype, torch.float32))
    normed_MD = wide_MD * torch.rsqrt(wide_MD.square().mean(dim=-1, keepdim=True) + epsilon)
    return (normed_MD * (weight_D.to(wide_MD.dtype) + offset)).to(x_MD.dtype)
