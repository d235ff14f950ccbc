"""What `gpu.py` times: operators, forward and backward, on shapes of real models, each with its contenders."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from gpu_meter import EAGER, OURS, Contender, Problem, Program
from gpu_models import EPSILON, SCALE, Model, Setting
from gpu_peers import PEERS, Build, Inputs, Peer
from torch import Tensor, nn

from luthier.kernels.attention_varlen import attention_varlen
from luthier.kernels.attention_varlen.reference import attention_varlen_reference
from luthier.kernels.dequantise import FORMATS, NF4_BLOCK, dense, dequantise, is_quantised
from luthier.kernels.gated_activation import swiglu
from luthier.kernels.grouped_lora_linear import LoraAdapter, Segment, grouped_lora_linear
from luthier.kernels.linear import linear
from luthier.kernels.linear_cross_entropy import linear_cross_entropy
from luthier.kernels.linear_logprob import linear_logprob
from luthier.kernels.lora_linear import Projection, lora_linear, lora_linear_multi
from luthier.kernels.rms_norm import rms_norm
from luthier.kernels.rope import rope
from luthier.kernels.tables import Impl


class Draw:
    """Makes tensors for a setting: the same ones for every contender."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._generator = torch.Generator(setting.device).manual_seed(0)

    def normal(self, *shape: int, learnt: bool = False, scale: float = 1.0) -> Tensor:
        """Normal numbers in the setting's dtype."""
        made = torch.randn(*shape, generator=self._generator, device=self._setting.device) * scale
        return made.to(self._setting.dtype).requires_grad_(learnt)

    def layer(self, name: str, inputs: int, outputs: int) -> dict[str, Tensor]:
        """A frozen weight and the float32 factors of its update: `name`, `name.a` and `name.b`."""
        return {name: self.normal(outputs, inputs, scale=inputs**-0.5), **self.factors(name, inputs, outputs)}

    def factors(self, name: str, inputs: int, outputs: int) -> dict[str, Tensor]:
        """`name.a` and `name.b`, learnt, in float32."""
        rank = self._setting.rank
        shapes = {f"{name}.a": (rank, inputs), f"{name}.b": (outputs, rank)}
        return {
            key: self.normal(*shape, scale=shape[1] ** -0.5).detach().float().requires_grad_()
            for key, shape in shapes.items()
        }

    def words(self, count: int, vocab: int) -> Tensor:
        """Random words."""
        return torch.randint(vocab, (count,), generator=self._generator, device=self._setting.device)

    def angles(self, tokens: int, size: int) -> dict[str, Tensor]:
        """`cos` and `sin` of rotary positions."""
        speed = 10000.0 ** -(torch.arange(0, size, 2).float() / size)
        angle = (torch.arange(tokens).float()[:, None] * speed).repeat(1, 2)
        pair = {"cos": angle.cos(), "sin": angle.sin()}
        return {name: one.to(self._setting.device, self._setting.dtype) for name, one in pair.items()}


Maker = Callable[[Model, Setting], tuple[Inputs, Callable[[Impl], Build], Build | None]]
"""Inputs of a problem; ours by its implementation; what torch.compile compiles where the eager op breaks its graph."""


def _projection(t: Inputs, name: str) -> Projection:
    return Projection(weight=t[name], a=t[f"{name}.a"], b=t[f"{name}.b"], scale=SCALE)


def _lora(model: Model, setting: Setting) -> Any:
    draw = Draw(setting)
    width = model.heads * model.head_dim
    inputs = {"x": draw.normal(setting.tokens, width, learnt=True), **draw.layer("o", width, model.hidden)}
    return inputs, lambda impl: lambda t: lambda: [lora_linear(t["x"], _projection(t, "o"), impl=impl)], None


def _qkv(model: Model, setting: Setting) -> Any:
    draw = Draw(setting)
    inputs = {"x": draw.normal(setting.tokens, model.hidden, learnt=True)}
    for name, heads in (("q", model.heads), ("k", model.key_heads), ("v", model.key_heads)):
        inputs |= draw.layer(name, model.hidden, heads * model.head_dim)

    def run(t: Inputs, impl: Impl) -> list[Tensor]:
        return lora_linear_multi(t["x"], [_projection(t, name) for name in "qkv"], impl=impl)

    return inputs, lambda impl: lambda t: lambda: run(t, impl), None


def _mlp(model: Model, setting: Setting) -> Any:
    draw = Draw(setting)
    inputs = {"x": draw.normal(setting.tokens, model.hidden, learnt=True)}
    inputs |= draw.layer("gate", model.hidden, model.feed_forward)
    inputs |= draw.layer("up", model.hidden, model.feed_forward)
    inputs |= draw.layer("down", model.feed_forward, model.hidden)

    def run(t: Inputs, impl: Impl) -> list[Tensor]:
        pair = [_projection(t, "gate"), _projection(t, "up")]
        gate, up = lora_linear_multi(t["x"], pair, impl=impl)
        return [lora_linear(swiglu(gate, up, impl=impl), _projection(t, "down"), impl=impl)]

    return inputs, lambda impl: lambda t: lambda: run(t, impl), None


def _grouped(model: Model, setting: Setting) -> Any:
    draw = Draw(setting)
    count = setting.adapters
    rows = setting.tokens // count
    inputs = {
        "x": draw.normal(rows * count, model.hidden, learnt=True),
        "up": draw.normal(model.feed_forward, model.hidden, scale=model.hidden**-0.5),
    }
    for index in range(count):
        inputs |= draw.factors(str(index), model.hidden, model.feed_forward)
    segments = [Segment(num_rows=rows, adapter=index) for index in range(count)]

    def run(t: Inputs, impl: Impl) -> list[Tensor]:
        adapters = [LoraAdapter(a=t[f"{one}.a"], b=t[f"{one}.b"], scale=SCALE) for one in range(count)]
        return [grouped_lora_linear(t["x"], t["up"], None, adapters, segments, impl=impl)]

    return inputs, lambda impl: lambda t: lambda: run(t, impl), None


def _head(model: Model, setting: Setting) -> dict[str, Tensor]:
    draw = Draw(setting)
    return {
        "hidden": draw.normal(setting.labelled, model.hidden, learnt=True),
        "weight": draw.normal(model.vocab, model.hidden, scale=model.hidden**-0.5),
        "target": draw.words(setting.labelled, model.vocab),
    }


def _loss(model: Model, setting: Setting) -> Any:
    def run(t: Inputs, impl: Impl) -> list[Tensor]:
        return [linear_cross_entropy(t["hidden"], t["weight"], t["target"], impl=impl).loss_sum]

    def plain(t: Inputs) -> list[Tensor]:
        logits = nn.functional.linear(t["hidden"], t["weight"]).float()
        return [nn.functional.cross_entropy(logits, t["target"], reduction="sum")]

    return _head(model, setting), lambda impl: lambda t: lambda: run(t, impl), lambda t: lambda: plain(t)


def _logprob(model: Model, setting: Setting) -> Any:
    def run(t: Inputs, impl: Impl) -> list[Tensor]:
        return [linear_logprob(t["hidden"], t["weight"], t["target"], impl=impl).logprob]

    def plain(t: Inputs) -> list[Tensor]:
        logits = nn.functional.linear(t["hidden"], t["weight"]).float()
        return [logits.log_softmax(dim=1).gather(1, t["target"][:, None]).squeeze(1)]

    return _head(model, setting), lambda impl: lambda t: lambda: run(t, impl), lambda t: lambda: plain(t)


def _norm(model: Model, setting: Setting) -> Any:
    draw = Draw(setting)
    x = draw.normal(setting.tokens, model.hidden, learnt=True)
    inputs = {"x": x, "weight": draw.normal(model.hidden)}
    return inputs, lambda impl: lambda t: lambda: [rms_norm(t["x"], t["weight"], EPSILON, impl=impl)], None


def _rope(model: Model, setting: Setting) -> Any:
    draw = Draw(setting)
    inputs = {
        "q": draw.normal(setting.tokens, model.heads, model.head_dim, learnt=True),
        "k": draw.normal(setting.tokens, model.key_heads, model.head_dim, learnt=True),
        **draw.angles(setting.tokens, model.head_dim),
    }

    def run(t: Inputs, impl: Impl) -> list[Tensor]:
        return [rope(t[name], t["cos"], t["sin"], impl=impl) for name in "qk"]

    return inputs, lambda impl: lambda t: lambda: run(t, impl), None


def _gated(model: Model, setting: Setting) -> Any:
    draw = Draw(setting)
    shape = (setting.tokens, model.feed_forward)
    inputs = {name: draw.normal(*shape, learnt=True) for name in ("gate", "up")}
    return inputs, lambda impl: lambda t: lambda: [swiglu(t["gate"], t["up"], impl=impl)], None


def _attention(model: Model, setting: Setting) -> Any:
    draw = Draw(setting)
    bounds = [0, *accumulate(setting.lengths)]
    inputs: dict[str, Tensor] = {"bounds": torch.tensor(bounds, dtype=torch.int32, device=setting.device)}
    for name, heads in (("q", model.heads), ("k", model.key_heads), ("v", model.key_heads)):
        inputs[name] = draw.normal(setting.tokens, heads, model.head_dim, learnt=True)

    def run(t: Inputs, impl: Impl) -> list[Tensor]:
        # Ours on a GPU is the choice among libraries' kernels.
        chosen: Impl = "auto" if impl == "triton" else impl
        return [attention_varlen(t["q"], t["k"], t["v"], bounds, impl=chosen)]

    def plain(t: Inputs) -> list[Tensor]:
        return [attention_varlen_reference(t["q"], t["k"], t["v"], bounds, model.head_dim**-0.5)]

    return inputs, lambda impl: lambda t: lambda: run(t, impl), lambda t: lambda: plain(t)


def _quantised(weight: Tensor, name: str) -> Tensor:
    from torchao.quantization import Int8Tensor, PerRow, to_nf4

    blocks = weight.numel() // NF4_BLOCK
    found: Tensor = (
        Int8Tensor.from_hp(weight, PerRow())
        if name == "int8"
        else to_nf4(weight, NF4_BLOCK, math.gcd(256, blocks))
    )
    return found


def _packed(name: str, model: Model, setting: Setting) -> Any:
    """Two products with weights of a format, from a model's width to that of its feed-forward block and back."""
    draw = Draw(setting)
    sizes = {"up": (model.feed_forward, model.hidden), "down": (model.hidden, model.feed_forward)}
    inputs = {"x": draw.normal(setting.tokens, model.hidden, learnt=True)}
    for key, shape in sizes.items():
        inputs[key] = _quantised(draw.normal(*shape, scale=shape[1] ** -0.5), name)

    def run(t: Inputs, impl: Impl) -> list[Tensor]:
        return [linear(linear(t["x"], t["up"], impl=impl), t["down"], impl=impl)]

    return inputs, lambda impl: lambda t: lambda: run(t, impl), None


def _numbers(name: str, model: Model, setting: Setting) -> Any:
    draw = Draw(setting)
    inputs = {"weight": _quantised(draw.normal(model.feed_forward, model.hidden), name)}

    def run(t: Inputs, impl: Impl) -> list[Tensor]:
        return [dequantise(t["weight"], impl=impl) if is_quantised(t["weight"]) else t["weight"]]

    return inputs, lambda impl: lambda t: lambda: run(t, impl), None


OPERATORS: Mapping[str, Maker] = {
    "lora_linear": _lora,
    "lora_linear_multi": _qkv,
    "lora_mlp": _mlp,
    "grouped_lora_linear": _grouped,
    "linear_cross_entropy": _loss,
    "linear_logprob": _logprob,
    "rms_norm": _norm,
    "rope": _rope,
    "gated_activation": _gated,
    "attention_varlen": _attention,
    **{f"linear_{name}": partial(_packed, name) for name in FORMATS.values()},
    **{f"dequantise_{name}": partial(_numbers, name) for name in FORMATS.values()},
}
"""By name; `lora_mlp` is a whole feed-forward block of gate, up and down projections with their activation."""


def problem(op: str, model: Model, setting: Setting) -> Problem:
    """An operator's problem of a model's shapes, with all of its contenders."""
    inputs, ours, plain = OPERATORS[op](model, setting)
    compiled = plain or ours("eager")
    builds = {
        OURS: Peer(build=ours("triton")),
        EAGER: Peer(build=ours("eager")),
        "torch.compile": Peer(
            build=lambda t: torch.compile(compiled(t), dynamic=False, backend=setting.backend)
        ),
        **PEERS.get(op, {}),
    }
    return Problem(
        dtype=setting.dtype,
        reference=lambda: program(ours("eager"), _wide(inputs), setting.dtype),
        contenders={
            name: Contender(partial(program, peer.build, inputs, setting.dtype), peer.packages)
            for name, peer in builds.items()
        },
    )


def _wide(inputs: Inputs) -> Inputs:
    made = {
        name: dense(one.detach()).float() if one.is_floating_point() else one for name, one in inputs.items()
    }
    return {name: one.requires_grad_(inputs[name].requires_grad) for name, one in made.items()}


def leaves(inputs: Inputs) -> dict[str, Tensor]:
    """Copies of the learnt inputs, which a contender may overwrite, beside the others; parameters, as modules want."""
    return {
        name: nn.Parameter(
            one.detach().clone() if one.requires_grad else one, requires_grad=one.requires_grad
        )
        if one.is_floating_point()
        else one
        for name, one in inputs.items()
    }


def program(build: Build, inputs: Inputs, dtype: torch.dtype) -> Program:
    """Forward and backward of one contender on tensors of its own, for gradients of the outputs that `dtype` holds."""
    mine = leaves(inputs)
    forward = build(mine)
    learnt = [name for name, one in inputs.items() if one.requires_grad]
    grads: list[tuple[Tensor, Tensor]] = []

    def run() -> list[Tensor]:
        outputs = list(forward())
        if not grads:
            made = [one.to(output.dtype) for one, output in zip(_drawn(outputs, dtype), outputs, strict=True)]
            grads.extend((one, one.clone()) for one in made)
        if not learnt:
            return outputs
        found = torch.autograd.grad(outputs, [mine[name] for name in learnt], [one for one, _ in grads])
        return [*outputs, *found]

    @torch.no_grad()
    def restore() -> None:
        # Some write their results over their inputs, or the gradients of these over those of the outputs.
        for name in learnt:
            mine[name].copy_(inputs[name])
        for own, kept in grads:
            own.copy_(kept)

    return Program(results=lambda: [one.detach() for one in run()], run=run, restore=restore)


def _drawn(outputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    return [torch.randn(one.shape, generator=generator, device=one.device).to(dtype) for one in outputs]
