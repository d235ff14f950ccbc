"""Eager reference of `linear`, in plain torch: any float dtype and device, gradients by autograd."""

from torch import Tensor, nn


def linear_reference(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """X weight^T + bias."""
    return nn.functional.linear(x_MK, weight_NK, bias_N)
