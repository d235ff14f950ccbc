"""Eager reference of `linear`, in plain torch: any float dtype and device, gradients by autograd."""

import torch
from torch import Tensor, nn

from luthier.kernels.dequantise.reference import frozen_linear

_WIDE_COLUMNS = 8192
"""Columns of an output whose part of the weight is in float32 at a time."""


def linear_reference(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """X weight^T + bias; the weight may be quantised."""
    return frozen_linear(x_MK, weight_NK, bias_N)


def wide_linear_reference(x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """X weight^T in float32, of a weight that is widened part by part."""
    x_MK = x_MK.float()
    parts = torch.split(weight_NK, _WIDE_COLUMNS)
    return torch.cat([nn.functional.linear(x_MK, part.float()) for part in parts], dim=1)
