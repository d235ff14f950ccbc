"""Gated activations of feed-forward blocks (arXiv:2002.05202). Importing this package does not import torch."""

from typing import TYPE_CHECKING, Literal

from luthier.kernels.tables import Impl, resolve, row_class

if TYPE_CHECKING:
    from torch import Tensor

Activation = Literal["silu", "gelu_tanh"]


def swiglu(gate: "Tensor", up: "Tensor", *, impl: Impl = "auto") -> "Tensor":
    """silu(gate) * up, element by element; see `gated`."""
    return gated(gate, up, "silu", impl=impl)


def geglu(gate: "Tensor", up: "Tensor", *, impl: Impl = "auto") -> "Tensor":
    """gelu(gate) * up with the tanh form of gelu, element by element; see `gated`."""
    return gated(gate, up, "gelu_tanh", impl=impl)


def gated(gate: "Tensor", up: "Tensor", activation: Activation, *, impl: Impl = "auto") -> "Tensor":
    """activation(gate) * up for two tensors of one shape [..., F]; kept for backward are the two alone.

    `cpu` is C++ (bfloat16 or float32, computed in float32 and rounded once); `eager` is plain torch; `auto` takes
    what the committed table measured as faster.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or `impl` cannot run on them.
    """
    from luthier.kernels.operands import refusal, require_same

    require_same(gate=gate, up=up)
    if gate.shape != up.shape or gate.dim() < 1 or gate.shape[-1] == 0:
        raise ValueError(
            f"gate and up must have one shape [..., F], got {tuple(gate.shape)}, {tuple(up.shape)}"
        )
    if activation not in ("silu", "gelu_tanh"):
        raise ValueError(f"activation must be silu or gelu_tanh, got {activation!r}")
    shape = row_class(gate.numel() // gate.shape[-1], gate.numel(), gate.device.type)
    chosen = resolve("gated_activation", impl, refusal(impl, gate), gate, shape)
    if chosen == "eager":
        from luthier.kernels.gated_activation.reference import gated_reference

        return gated_reference(gate, up, activation)
    from luthier.kernels.direct import run
    from luthier.kernels.gated_activation.cpu import gated_activation_op

    rows = gate.reshape(-1, gate.shape[-1]), up.reshape(-1, up.shape[-1])
    flat: Tensor = run(chosen, gated_activation_op, *rows, activation == "gelu_tanh")
    return flat.view(gate.shape)
