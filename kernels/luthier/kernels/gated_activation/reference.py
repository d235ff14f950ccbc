"""Eager reference of `swiglu` and `geglu`, in plain torch: any float dtype and device, gradients by autograd."""

from torch import Tensor, nn


def gated_reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up, with activation silu or gelu (by tanh)."""
    if activation == "silu":
        return nn.functional.silu(gate) * up
    return nn.functional.gelu(gate, approximate="tanh") * up
