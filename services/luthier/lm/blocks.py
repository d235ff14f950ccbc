"""A model's attention, feed-forward and norm modules, replaced whole by ones that run on our kernels.

The new modules hold the parameters and submodules of the old ones under the same names, so that state dicts, and the
names of adapters, stay as they are. Which kernels then run is decided by their measured tables.

Shape suffixes: B rows, T tokens of a packed row, H query heads, G key/value heads, D head size, E hidden size.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from luthier.kernels.attention_decode import NewTokens
from luthier.kernels.attention_varlen import attention_varlen
from luthier.kernels.gated_activation import Activation, gated
from luthier.kernels.linear import linear
from luthier.kernels.lora_linear import lora_linear_multi
from luthier.kernels.rms_norm import rms_norm
from luthier.kernels.rope import rope
from luthier.lm.attention import attention
from luthier.lm.lora_layer import LoraLinear

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
"""What transformers calls an activation -> what our kernel calls it."""

_NORM_OFFSETS = {
    "LlamaRMSNorm": 0.0,
    "MistralRMSNorm": 0.0,
    "Qwen2RMSNorm": 0.0,
    "Qwen3RMSNorm": 0.0,
    "Phi3RMSNorm": 0.0,
    "SmolLM3RMSNorm": 0.0,
    "GemmaRMSNorm": 1.0,
    "Gemma2RMSNorm": 1.0,
}
"""Norm classes, and what they add to their weight."""

_ATTENTIONS = frozenset(
    f"{name}Attention"
    for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "SmolLM3", "Gemma", "Gemma2")
)
_MLPS = frozenset(
    f"{name}MLP" for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "SmolLM3", "Gemma", "Gemma2")
)


def use_kernels(model: PreTrainedModel) -> dict[str, int]:
    """Replace the modules that we know, in place; returns how many of each kind: attention, linear, mlp, norm."""
    counts = {"attention": 0, "linear": 0, "mlp": 0, "norm": 0}
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            model.set_submodule(name, Linear(module))
            counts["linear"] += 1
    for name, module in list(model.named_modules()):
        kind = type(module).__name__
        if kind in _NORM_OFFSETS:
            # Norms inside an attention module are reached through the new one, which holds them.
            model.set_submodule(name, RmsNorm(module, _NORM_OFFSETS[kind]))
            counts["norm"] += 1
    for name, module in list(model.named_modules()):
        if type(module).__name__ in _ATTENTIONS:
            model.set_submodule(name, Attention(module))
            counts["attention"] += 1
        elif type(module).__name__ in _MLPS and _activation(module) is not None:
            model.set_submodule(name, GatedMlp(module))
            counts["mlp"] += 1
    return counts


def _activation(mlp: nn.Module) -> Activation | None:
    config: Any = mlp.config
    name = getattr(config, "hidden_activation", None) or config.hidden_act
    return _ACTIVATIONS.get(name)


def project(x: Tensor, linears: Sequence[nn.Module]) -> list[Tensor]:
    """Several linear layers of the same x, those with an active update in one pass over x."""
    updates = [layer.projection() if isinstance(layer, LoraLinear) else None for layer in linears]
    together = [update for update in updates if update is not None]
    if len(together) < 2:
        return [layer(x) for layer in linears]
    first = next(one for one, update in zip(linears, updates, strict=True) if update is not None)
    assert isinstance(first, LoraLinear)
    outputs = iter(lora_linear_multi(x, together, dropout=first.dropout()))
    return [
        layer(x) if update is None else next(outputs) for layer, update in zip(linears, updates, strict=True)
    ]


class Linear(nn.Linear):
    """A linear layer with the parameters of the one that it replaces."""

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        return linear(x, self.weight, self.bias)


class RmsNorm(nn.Module):
    """A root-mean-square norm over the last dimension; `weight` [E] is that of the module it replaces."""

    def __init__(self, norm: nn.Module, offset: float) -> None:
        super().__init__()
        weight, epsilon = norm.weight, getattr(norm, "variance_epsilon", None)
        assert isinstance(weight, nn.Parameter)
        self.weight = weight
        told: Any = norm.eps if epsilon is None else epsilon
        self.epsilon = float(told)
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        """[..., E] -> [..., E]."""
        return rms_norm(x, self.weight, self.epsilon, offset=self.offset)


class GatedMlp(nn.Module):
    """down(activation(gate(x)) * up(x)), gate and up in one layer or two."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        for name, child in mlp.named_children():
            if isinstance(child, nn.Linear | LoraLinear):
                self.add_module(name, child)
        activation = _activation(mlp)
        assert activation is not None
        self.activation: Activation = activation
        self.is_joined = hasattr(mlp, "gate_up_proj")

    def forward(self, x: Tensor) -> Tensor:
        """[..., E] -> [..., E]."""
        if self.is_joined:
            gate, up = self.get_submodule("gate_up_proj")(x).chunk(2, dim=-1)
        else:
            gate, up = project(x, [self.get_submodule("gate_proj"), self.get_submodule("up_proj")])
        output: Tensor = self.get_submodule("down_proj")(gated(gate, up, self.activation))
        return output


class Attention(nn.Module):
    """Causal self-attention with rotary positions: packed batches on our kernel, caches through `attention`.

    Query, key and value come from one layer or three, are normed head by head where the model has such norms, and
    see a sliding window or capped scores where the model says so.
    """

    def __init__(self, inner: Any) -> None:
        super().__init__()
        for name, child in inner.named_children():
            self.add_module(name, child)
        self.config = inner.config
        self.layer_idx: int = inner.layer_idx
        self.head_dim: int = inner.head_dim
        self.num_key_value_groups: int = inner.num_key_value_groups
        self.scaling: float = inner.scaling
        self.is_causal: bool = inner.is_causal
        # Mistral and Phi-3 say it in the config alone, for all layers.
        in_config = (
            getattr(inner.config, "sliding_window", None)
            if not hasattr(inner.config, "layer_types")
            else None
        )
        self.sliding_window: int | None = getattr(inner, "sliding_window", in_config)
        self.softcap: float = getattr(inner, "attn_logit_softcapping", None) or 0.0
        self.use_rope = bool(getattr(inner, "use_rope", True))

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Any = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """What transformers calls for every layer: hidden_states [B, T, E] -> [B, T, E] and None."""
        query, key, value = self._heads(hidden_states)
        bounds: Sequence[int] | None = options.get("packed_bounds")
        if bounds is not None and cache is None:
            turned = self._turn(query[0], key[0], position_embeddings[0][0], position_embeddings[1][0])
            output = attention_varlen(
                *turned,
                value[0],
                bounds,
                scale=self.scaling,
                softcap=self.softcap,
                window=self.sliding_window or 0,
            )[None]
        else:
            output = self._attend_cached(
                (query, key, value), position_embeddings, attention_mask, cache, options
            )
        projected: Tensor = self.get_submodule("o_proj")(output.flatten(2))
        return projected, None

    def _heads(self, x: Tensor) -> list[Tensor]:
        """Query [B, T, H, D], key and value [B, T, G, D], normed but not turned."""
        if hasattr(self, "qkv_proj"):
            joined = self.get_submodule("qkv_proj")(x).view(*x.shape[:-1], -1, self.head_dim)
            groups = joined.shape[2] // (self.num_key_value_groups + 2)
            parts = list(joined.split([groups * self.num_key_value_groups, groups, groups], dim=2))
        else:
            linears = [self.get_submodule(name) for name in ("q_proj", "k_proj", "v_proj")]
            parts = [part.view(*x.shape[:-1], -1, self.head_dim) for part in project(x, linears)]
        for index, name in enumerate(("q_norm", "k_norm")):
            if hasattr(self, name):
                parts[index] = self.get_submodule(name)(parts[index])
        return parts

    def _turn(
        self, query_THD: Tensor, key_TGD: Tensor, cos_TR: Tensor, sin_TR: Tensor
    ) -> tuple[Tensor, Tensor]:
        if not self.use_rope:
            return query_THD, key_TGD
        return rope(query_THD, cos_TR, sin_TR), rope(key_TGD, cos_TR, sin_TR)

    def _attend_cached(
        self,
        heads: tuple[Tensor, Tensor, Tensor],
        position_embeddings: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: Any,
        options: dict[str, Any],
    ) -> Tensor:
        """Attention [B, T, H, D] over the keys and values that a cache holds, if there is one."""
        B, T = heads[0].shape[:2]
        joint = options.get("joint_rows")
        if joint is not None and joint.is_one_call:
            cos, sin = joint.angles or (one.expand(B, -1, -1)[:, 0] for one in position_embeddings)
            query, key, value = (one[:, 0] for one in heads)
            new = NewTokens(query, key, value, (cos, sin) if self.use_rope else None)
            limits = {"softcap": self.softcap, "window": self.sliding_window}
            output: Tensor = joint.attend(new, self.layer_idx, scale=self.scaling, **limits)[:, None]
            return output
        cos, sin = (angles.expand(B, -1, -1).flatten(0, 1) for angles in position_embeddings)
        turned = self._turn(heads[0].flatten(0, 1), heads[1].flatten(0, 1), cos, sin)
        query, key = (part.view(B, T, *part.shape[1:]).transpose(1, 2) for part in turned)
        value = heads[2].transpose(1, 2)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        settings = {"scaling": self.scaling, "dropout": 0.0, "sliding_window": self.sliding_window}
        output, _ = attention(self, query, key, value, mask, **settings, softcap=self.softcap, **options)
        return output


def final_softcap(model: PreTrainedModel) -> float:
    """The cap of the model's logits (Gemma 2), or 0."""
    return float(getattr(model.config, "final_logit_softcapping", None) or 0.0)
