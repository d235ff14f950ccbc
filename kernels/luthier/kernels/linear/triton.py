"""`linear` on GPUs of quantised weights, whose codes the products read. Shape suffixes: M rows, K inputs, N outputs.

The library multiplies with every other weight: what watches an operator is given the numbers of a quantised one.
"""

import torch
from torch import Tensor, nn

from luthier.kernels.dequantise import is_quantised
from luthier.kernels.dequantise.triton import packed_gradient, packed_product
from luthier.kernels.linear.cpu import linear_backward_op, linear_op
from luthier.kernels.operands import rows_of


@linear_op.on_gpu_with_codes
def linear_triton(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor) -> Tensor:
    """Output [M, N], as the C++ kernel."""
    bias = bias_N if bias_N.numel() else None
    if is_quantised(weight_NK):
        return packed_product(rows_of(x_MK), weight_NK, bias)
    return nn.functional.linear(x_MK, weight_NK, bias)


@linear_backward_op.on_gpu_with_codes
def linear_backward_triton(
    grad_MN: Tensor, x_MK: Tensor, weight_NK: Tensor, needs: list[bool]
) -> list[Tensor]:
    """Gradients of x [M, K], weight [N, K] and bias [N], as the C++ kernel; a quantised weight has none."""
    found = [x_MK.new_empty(0) for _ in needs]
    if needs[0]:
        quantised = is_quantised(weight_NK)
        found[0] = packed_gradient(rows_of(grad_MN), weight_NK) if quantised else grad_MN @ weight_NK
    if needs[1]:
        found[1] = grad_MN.T @ x_MK
    if needs[2]:
        found[2] = grad_MN.sum(dim=0, dtype=torch.float32).to(x_MK.dtype)
    return found
