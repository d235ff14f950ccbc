"""A linear layer with low-rank updates, and the switch that says which of them is active.

Shape suffixes: I inputs, O outputs, P some of the outputs, R rank.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from luthier.kernels.dequantise import dense
from luthier.kernels.linear import linear
from luthier.kernels.lora_linear import Dropout, Projection, lora_linear
from luthier.lm.trained_weights import ExchangedWeights

if TYPE_CHECKING:
    from luthier.lm.lora import Adapter

SWITCH = "luthier_adapter_switch"
"""Under which name a model has its `AdapterSwitch`."""
_PIECE_ELEMENTS = 1 << 18


class Factors(NamedTuple):
    """What an adapter has of one module: A [R, I], B [O, R], and with DoRA the lengths of the weight's rows, [O]."""

    a: Tensor
    b: Tensor
    magnitude: Tensor | None = None


class AdapterSwitch:
    """Which adapter a model's forward uses now, and what it drops; one object shared by all its `LoraLinear`s.

    The update of an active adapter that `is_muted` is computed and counts for nothing.
    """

    __slots__ = ("active", "adapters", "dropout", "is_muted", "weights")

    def __init__(self) -> None:
        self.active: str | None = None
        self.dropout: Dropout | None = None
        self.is_muted = False
        self.adapters: dict[str, Adapter] = {}
        self.weights = ExchangedWeights()

    def choose(self, name: str | None) -> None:
        """Make an adapter active, or the base."""
        self.active = name
        self.weights.put(None if self.is_muted else name)

    def mute(self, *, is_muted: bool) -> None:
        """Let the active adapter count for nothing, or for something again."""
        self.is_muted = is_muted
        self.choose(self.active)


def adapter_switch(model: nn.Module) -> AdapterSwitch | None:
    """What says which adapter a model uses; None: it has never had one."""
    # Every token that is made asks for it: a look at all modules takes as long as some layers.
    switch: AdapterSwitch | None = model.__dict__.get(SWITCH)
    return switch


class LoraLinear(nn.Module):
    """A frozen linear layer with named low-rank updates, of which at most one is active.

    `weight` and `bias` are the parameters of the layer that it replaces (the same objects), so the names of
    the base model's state dict stay as they are. `lora_A[name]` is [R, I] and `lora_B[name]` [O, R], both
    float32; so is `lora_magnitude_vector[name]` [O] of an update that has one (DoRA).
    """

    def __init__(self, linear: nn.Linear, switch: AdapterSwitch, name: str) -> None:
        super().__init__()
        # Of 32 bits: what tells layers apart where masks are drawn.
        self.stream = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.weight = linear.weight
        self.bias = linear.bias
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.lora_magnitude_vector = nn.ParameterDict()
        self._kept_lengths: dict[str, tuple[tuple[int, int], Tensor]] = {}
        self.scales: dict[str, float] = {}
        self.switch = switch

    def add(self, name: str, factors: Factors, scale: float) -> None:
        """Add an update under `name`; its factors become float32 parameters on the device of the weight."""
        device = self.weight.device
        held = (self.lora_A, self.lora_B, self.lora_magnitude_vector)
        for parameters, tensor in zip(held, factors, strict=True):
            if tensor is not None:
                parameters[name] = nn.Parameter(tensor.to(device=device, dtype=torch.float32))
        self.scales[name] = scale

    def remove(self, name: str) -> None:
        """Forget the update `name`; no effect when this layer has none of that name."""
        if name in self.scales:
            del self.lora_A[name], self.lora_B[name], self.scales[name]
            self._kept_lengths.pop(name, None)
            if name in self.lora_magnitude_vector:
                del self.lora_magnitude_vector[name]

    def projection(self) -> Projection | None:
        """This layer with the active adapter's update, for the LoRA kernels; None where it has none, or a magnitude."""
        name = self.switch.active
        if name is None or name not in self.scales or name in self.lora_magnitude_vector:
            return None
        return Projection(
            weight=self.weight,
            bias=self.bias,
            a=self.lora_A[name],
            b=self.lora_B[name],
            scale=0.0 if self.switch.is_muted else self.scales[name],
        )

    def merged_weight(self, name: str) -> Tensor:
        """The weight [O, I] that does what this layer does with update `name`, float32."""
        added = torch.addmm(
            self.weight.float(), self.lora_B[name], self.lora_A[name], alpha=self.scales[name]
        )
        if name not in self.lora_magnitude_vector:
            return added
        lengths_O1 = torch.linalg.vector_norm(added, dim=1, keepdim=True)
        merged: Tensor = added * (self.lora_magnitude_vector[name][:, None] / lengths_O1)
        return merged

    def dropout(self) -> Dropout | None:
        """What is dropped of this layer's input on its way into the update; None: nothing."""
        dropout = self.switch.dropout
        return None if dropout is None else replace(dropout, stream=self.stream)

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O], with the active adapter's update where this layer has one."""
        projection = self.projection()
        if projection is not None:
            return lora_linear(x, projection, dropout=self.dropout())
        name = self.switch.active
        if name is not None and name in self.lora_magnitude_vector:
            return self._with_magnitude(x, name)
        return linear(x, self.weight, self.bias)

    def _with_magnitude(self, x: Tensor, name: str) -> Tensor:
        """What DoRA computes, in plain torch around our products.

        A muted update has the bits of one that is zero.
        """
        output = linear(x, self.weight, None)
        if not self.switch.is_muted:
            a_RI, b_OR = self.lora_A[name].to(x.dtype), self.lora_B[name].to(x.dtype)
            update = linear(linear(x, a_RI), b_OR).float() * self.scales[name]
            share_O = self.lora_magnitude_vector[name] / self._lengths(
                name, is_learning=torch.is_grad_enabled()
            )
            output = ((output.float() + update) * share_O).to(x.dtype)
        return output if self.bias is None else output + self.bias

    @torch.no_grad()
    def _lengths(self, name: str, *, is_learning: bool) -> Tensor:
        """The lengths [O] of the rows of the weight with an update; as in DoRA's paper no gradient passes through them.

        They are kept while answers are drawn, which asks for them at each token, and not while anything is learnt.
        """
        a_RI, b_OR = self.lora_A[name], self.lora_B[name]
        versions = (a_RI._version, b_OR._version)
        kept = self._kept_lengths.get(name)
        if kept is not None and kept[0] == versions and not is_learning:
            return kept[1]
        found = row_lengths(self.weight, a_RI, b_OR, self.scales[name])
        self._kept_lengths.pop(name, None)
        if not is_learning:
            self._kept_lengths[name] = (versions, found)
        return found


@torch.no_grad()
def row_lengths(weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    """The Euclidean lengths [O], float32, of the rows of W + scale * B A, some rows at a time.

    A quantised weight counts as the numbers that it stands for, which are there as a whole meanwhile.
    """
    num_rows = max(1, _PIECE_ELEMENTS // weight_OI.shape[1])
    weight_OI = dense(weight_OI)
    parts = [
        torch.linalg.vector_norm(torch.addmm(rows.float(), b_PR, a_RI, alpha=scale), dim=1)
        for rows, b_PR in zip(torch.split(weight_OI, num_rows), torch.split(b_OR, num_rows), strict=True)
    ]
    return torch.cat(parts)
