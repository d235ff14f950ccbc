"""What others offer for the operators that `gpu.py` times, each imported only when it is made ready.

A peer is called as its own library calls it in training. Rows become a batch of one where a peer wants a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from gpu_models import EPSILON, SCALE
from torch import Tensor, nn

Inputs = Mapping[str, Tensor]
"""By name; those that are learnt require a gradient."""
Build = Callable[[Inputs], Callable[[], Sequence[Tensor]]]
"""Takes inputs that are the contender's own and gives its forward pass."""

LIGER = {"liger_kernel": "liger-kernel"}
CUT = {"cut_cross_entropy": "cut-cross-entropy"}
PEFT = {"peft": "peft"}
UNSLOTH = {"unsloth": "unsloth", **PEFT}


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A contender for one operator, and the packages that it takes."""

    build: Build
    packages: Mapping[str, str] = field(default_factory=dict)


def peft_layer(t: Inputs, name: str) -> Any:
    """PEFT's layer of a frozen weight and its factors, which are its very parameters."""
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    weight, a, b = t[name], t[f"{name}.a"], t[f"{name}.b"]
    with torch.device("meta"):
        base = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    assert isinstance(weight, nn.Parameter)
    base.weight = weight
    config = LoraConfig(r=a.shape[0], lora_alpha=SCALE * a.shape[0])
    layer = Linear(base, "default", config=config, r=a.shape[0], lora_alpha=SCALE * a.shape[0])
    layer.lora_A["default"].weight = a
    layer.lora_B["default"].weight = b
    return layer


def _peft_layers(*names: str) -> Build:
    def build(t: Inputs) -> Callable[[], list[Tensor]]:
        layers = [peft_layer(t, name) for name in names]
        return lambda: [layer(t["x"]) for layer in layers]

    return build


def _peft_mlp(t: Inputs) -> Callable[[], list[Tensor]]:
    gate, up, down = (peft_layer(t, name) for name in ("gate", "up", "down"))
    return lambda: [down(nn.functional.silu(gate(t["x"])) * up(t["x"]))]


def _unsloth_block(t: Inputs, *names: str) -> SimpleNamespace:
    return SimpleNamespace(**{f"{name}_proj": peft_layer(t, name) for name in names})


def _unsloth_o(t: Inputs) -> Callable[[], list[Tensor]]:
    from unsloth.kernels import apply_lora_o

    block = _unsloth_block(t, "o")
    return lambda: [apply_lora_o(block, t["x"][None])[0]]


def _unsloth_qkv(t: Inputs) -> Callable[[], list[Tensor]]:
    from unsloth.kernels import apply_lora_qkv

    block = _unsloth_block(t, "q", "k", "v")
    return lambda: [one[0] for one in apply_lora_qkv(block, t["x"][None])]


def _unsloth_mlp(t: Inputs) -> Callable[[], list[Tensor]]:
    from unsloth.kernels import apply_lora_mlp_swiglu

    block = _unsloth_block(t, "gate", "up", "down")
    return lambda: [apply_lora_mlp_swiglu(block, t["x"][None])[0]]


def _unsloth_norm(t: Inputs) -> Callable[[], list[Tensor]]:
    from unsloth.kernels import fast_rms_layernorm

    norm = SimpleNamespace(weight=t["weight"], variance_epsilon=EPSILON)
    return lambda: [fast_rms_layernorm(norm, t["x"][None])[0]]


def _unsloth_rope(t: Inputs) -> Callable[[], list[Tensor]]:
    from unsloth.kernels import fast_rope_embedding

    def run() -> list[Tensor]:
        # Transposed views of contiguous rows, as projections give them.
        q, k = (t[name][None].transpose(1, 2) for name in "qk")
        return [one.transpose(1, 2)[0] for one in fast_rope_embedding(q, k, t["cos"], t["sin"])]

    return run


def _unsloth_loss(t: Inputs) -> Callable[[], list[Tensor]]:
    from unsloth.kernels.cross_entropy_loss import Fast_CrossEntropyLoss

    def run() -> list[Tensor]:
        logits = nn.functional.linear(t["hidden"], t["weight"])
        return [Fast_CrossEntropyLoss.apply(logits, t["target"], 0, 0).sum()]

    return run


def _liger_norm(t: Inputs) -> Callable[[], list[Tensor]]:
    from liger_kernel.ops import LigerRMSNormFunction

    return lambda: [LigerRMSNormFunction.apply(t["x"], t["weight"], EPSILON)]


def _liger_rope(t: Inputs) -> Callable[[], list[Tensor]]:
    from liger_kernel.ops import LigerRopeFunction

    def run() -> list[Tensor]:
        # As in _unsloth_rope.
        q, k = (t[name][None].transpose(1, 2) for name in "qk")
        turned = LigerRopeFunction.apply(q, k, t["cos"][None], t["sin"][None])
        return [one.transpose(1, 2)[0] for one in turned]

    return run


def _liger_gated(t: Inputs) -> Callable[[], list[Tensor]]:
    from liger_kernel.ops import LigerSiLUMulFunction

    return lambda: [LigerSiLUMulFunction.apply(t["gate"], t["up"])]


def _liger_loss(t: Inputs) -> Callable[[], list[Tensor]]:
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    def run() -> list[Tensor]:
        # bias, class weights, ignored label, z-loss, smoothing, reduction
        options = (None, None, -100, 0.0, 0.0, "sum")
        found = LigerFusedLinearCrossEntropyFunction.apply(t["hidden"], t["weight"], t["target"], *options)
        return [found[0] if isinstance(found, tuple) else found]

    return run


def _cut(reduction: str, filter_eps: str | None) -> Build:
    def build(t: Inputs) -> Callable[[], list[Tensor]]:
        from cut_cross_entropy import linear_cross_entropy

        options = {"reduction": reduction, "filter_eps": filter_eps, "impl": "cce"}
        sign = -1.0 if reduction == "none" else 1.0
        return lambda: [sign * linear_cross_entropy(t["hidden"], t["weight"], t["target"], **options).float()]

    return build


def _torch_varlen(t: Inputs) -> Callable[[], list[Tensor]]:
    from torch.nn.attention.varlen import varlen_attn

    bounds = t["bounds"]
    longest = max(end - start for start, end in pairwise(bounds.tolist()))
    heads = (t["q"], t["k"], t["v"])

    def run() -> list[Tensor]:
        found = varlen_attn(*heads, bounds, bounds, longest, longest, window_size=(-1, 0), enable_gqa=True)
        assert isinstance(found, Tensor)
        return [found]

    return run


PEERS: Mapping[str, Mapping[str, Peer]] = {
    "lora_linear": {
        "PEFT": Peer(build=_peft_layers("o"), packages=PEFT),
        "Unsloth": Peer(build=_unsloth_o, packages=UNSLOTH),
    },
    "lora_linear_multi": {
        "PEFT": Peer(build=_peft_layers("q", "k", "v"), packages=PEFT),
        "Unsloth": Peer(build=_unsloth_qkv, packages=UNSLOTH),
    },
    "lora_mlp": {
        "PEFT": Peer(build=_peft_mlp, packages=PEFT),
        "Unsloth": Peer(build=_unsloth_mlp, packages=UNSLOTH),
    },
    "linear_cross_entropy": {
        "Liger": Peer(build=_liger_loss, packages=LIGER),
        # Its default leaves out the gradients of words with a low probability.
        "cut-cross-entropy": Peer(build=_cut("sum", "high"), packages=CUT),
        "cut-cross-entropy, all gradients": Peer(build=_cut("sum", None), packages=CUT),
        "Unsloth": Peer(build=_unsloth_loss, packages=UNSLOTH),
    },
    "linear_logprob": {"cut-cross-entropy": Peer(build=_cut("none", "high"), packages=CUT)},
    "rms_norm": {
        "Liger": Peer(build=_liger_norm, packages=LIGER),
        "Unsloth": Peer(build=_unsloth_norm, packages=UNSLOTH),
    },
    "rope": {
        "Liger": Peer(build=_liger_rope, packages=LIGER),
        "Unsloth": Peer(build=_unsloth_rope, packages=UNSLOTH),
    },
    "gated_activation": {"Liger": Peer(build=_liger_gated, packages=LIGER)},
    "attention_varlen": {"torch varlen_attn": Peer(build=_torch_varlen)},
}
"""By operator and name; a package that is missing is said in the results."""
