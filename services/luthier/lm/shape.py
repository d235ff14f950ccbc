"""The sizes of a model, read from its `config.json`: what memory and time are counted by. Imports no torch.

Letters: E hidden size, L layers, H query heads, G key/value heads, D head size, F size between the MLP's products,
V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from luthier.errors import InvalidArgument, Reason

_TIED = frozenset({"GemmaForCausalLM", "Gemma2ForCausalLM", "SmolLM3ForCausalLM"})
"""Architectures whose head is the embedding where their `config.json` does not say."""
_KEY_HEADS = {"MistralForCausalLM": 8, "SmolLM3ForCausalLM": 4, "Gemma2ForCausalLM": 4}
_HEAD_SIZES = {"Qwen3ForCausalLM": 128, "GemmaForCausalLM": 256, "Gemma2ForCausalLM": 256}
"""What transformers 5 takes where `config.json` does not say; of others all heads, and E / H."""
_NORMS = {"Gemma2ForCausalLM": 4}
_BIASED = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearShape:
    """A linear layer within the model's layers: its name within a layer, inputs, outputs, and whether it has a bias."""

    name: str
    inputs: int
    outputs: int
    has_bias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of a model of one of our architectures.

    Attributes:
        hidden: E.
        layers: L.
        heads: H.
        key_heads: G.
        head_size: D.
        inner: F.
        vocabulary: V.
        norms: norms of a layer over E.
        has_head_norms: whether queries and keys are normed head by head.
        is_tied: whether the head is the embedding.
        linears: the linear layers of each layer.
    """

    hidden: int
    layers: int
    heads: int
    key_heads: int
    head_size: int
    inner: int
    vocabulary: int
    norms: int
    has_head_norms: bool
    is_tied: bool
    linears: tuple[LinearShape, ...]

    @property
    def num_products(self) -> int:
        """Weights of all layers' linear layers, which every token is multiplied with."""
        return self.layers * sum(one.inputs * one.outputs for one in self.linears)

    @property
    def num_parameters(self) -> int:
        """All weights, tied ones once."""
        biases = sum(one.outputs for one in self.linears if one.has_bias)
        norms = self.norms * self.hidden + (2 * self.head_size if self.has_head_norms else 0)
        words = self.vocabulary * self.hidden * (1 if self.is_tied else 2)
        return self.num_products + self.layers * (biases + norms) + self.hidden + words

    def modules(self) -> tuple[str, ...]:
        """Full names of all linear layers but the head, as adapters name them, sorted."""
        names = (f"model.layers.{layer}.{one.name}" for layer in range(self.layers) for one in self.linears)
        return tuple(sorted(names))

    def linear(self, module: str) -> LinearShape:
        """Return the sizes of the linear layer of a full name."""
        return next(one for one in self.linears if module.endswith(f".{one.name}"))


def shape_of(config: Mapping[str, Any]) -> ModelShape:
    """Return the sizes of the model of a config that `check_config` lets pass.

    Raises:
        InvalidArgument: it does not say its architecture, or a size that every model has (reason MODEL_INVALID).
    """
    name = _architecture(config)
    hidden, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
    layers, inner = _size(config, "num_hidden_layers"), _size(config, "intermediate_size")
    key_heads = int(config.get("num_key_value_heads") or _KEY_HEADS.get(name, heads))
    head_size = int(config.get("head_dim") or _HEAD_SIZES.get(name, hidden // heads))
    said_tied = config.get("tie_word_embeddings")
    return ModelShape(
        hidden=hidden,
        layers=layers,
        heads=heads,
        key_heads=key_heads,
        head_size=head_size,
        inner=inner,
        vocabulary=_size(config, "vocab_size"),
        norms=_NORMS.get(name, 2),
        has_head_norms=name.startswith("Qwen3"),
        is_tied=name in _TIED if said_tied is None else bool(said_tied),
        linears=_linears(name, config, (hidden, heads * head_size, key_heads * head_size, inner)),
    )


def _linears(
    name: str, config: Mapping[str, Any], sizes: tuple[int, int, int, int]
) -> tuple[LinearShape, ...]:
    hidden, queries, keys, inner = sizes
    in_attention = bool(config.get("attention_bias"))
    in_mlp = bool(config.get("mlp_bias"))
    if name.startswith("Phi3"):
        outputs = {
            "self_attn.qkv_proj": (hidden, queries + 2 * keys),
            "self_attn.o_proj": (queries, hidden),
            "mlp.gate_up_proj": (hidden, 2 * inner),
            "mlp.down_proj": (inner, hidden),
        }
    else:
        outputs = {
            "self_attn.q_proj": (hidden, queries),
            "self_attn.k_proj": (hidden, keys),
            "self_attn.v_proj": (hidden, keys),
            "self_attn.o_proj": (queries, hidden),
            "mlp.gate_proj": (hidden, inner),
            "mlp.up_proj": (hidden, inner),
            "mlp.down_proj": (inner, hidden),
        }
    found = []
    for module, (rows, columns) in outputs.items():
        biased = in_mlp if module.startswith("mlp.") else in_attention
        if name.startswith("Qwen2"):
            biased = module.endswith(_BIASED)
        elif name.startswith(("Phi3", "Mistral")):
            biased = False
        found.append(LinearShape(name=module, inputs=rows, outputs=columns, has_bias=biased))
    return tuple(found)


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1:
        raise _unsaid("architectures")
    return str(names[0])


def _size(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if value is None:
        raise _unsaid(name)
    return int(value)


def _unsaid(name: str) -> InvalidArgument:
    return InvalidArgument(
        f"config.json must say {name}, it does not; memory and time cannot be counted without",
        reason=Reason.MODEL_INVALID,
    )
