"""What `kernels.py` times: problems of real models' shapes, and for each the contenders, forward and backward."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise, product
from typing import Any, Literal

import torch
from torch import Tensor, nn

from luthier.kernels import attention_varlen as attention_op
from luthier.kernels import grouped_lora_linear as grouped_op
from luthier.kernels import linear as linear_op
from luthier.kernels import linear_cross_entropy as loss_op
from luthier.kernels import lora_linear as lora_op
from luthier.kernels.gated_activation import swiglu
from luthier.kernels.linear_logprob import linear_logprob
from luthier.kernels.rms_norm import rms_norm
from luthier.kernels.rope import rope

Run = Callable[[], None]
Side = Literal["cpu", "eager"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The shapes of a model that matter here."""

    name: str
    hidden: int
    feed_forward: int
    vocab: int
    heads: int
    key_heads: int
    head_dim: int


MODELS = (
    Model(name="SmolLM2-135M", hidden=576, feed_forward=1536, vocab=49152, heads=9, key_heads=3, head_dim=64),
    Model(
        name="Qwen2.5-0.5B", hidden=896, feed_forward=4864, vocab=151936, heads=14, key_heads=2, head_dim=64
    ),
    Model(
        name="Llama-3.2-1B", hidden=2048, feed_forward=8192, vocab=128256, heads=32, key_heads=8, head_dim=64
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One problem: `make` builds its contenders, of which `cpu` and `eager` are always two."""

    op: str
    name: str
    dtype: torch.dtype
    shape_class: str
    make: Callable[[], Mapping[str, Run]]
    is_headline: bool = False


# A model small enough that the slowest instruction set ends; its shapes fall in the same classes.
SMALL = Model(name="small", hidden=256, feed_forward=512, vocab=9000, heads=4, key_heads=2, head_dim=64)


def cases(dtypes: Sequence[torch.dtype], models: Sequence[Model]) -> Iterator[Case]:
    """All problems of the models' shapes."""
    for dtype in dtypes:
        for model in models:
            yield from _linear_cases(model, dtype)
            yield from _lora_cases(model, dtype)
            yield from _grouped_cases(model, dtype)
            yield from _loss_cases(model, dtype)
            yield from _attention_cases(model, dtype)
            yield from _elementwise_cases(model, dtype)


def _random(dtype: torch.dtype, *shape: int, learnt: bool = False, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(dtype).requires_grad_(learnt)


def _sides(make: Callable[[Side], Run]) -> dict[str, Run]:
    return {"cpu": make("cpu"), "eager": make("eager")}


def _step(forward: Callable[[], Tensor | Sequence[Tensor]]) -> Run:
    """Forward and backward, with gradients that are made once."""
    grads: list[Tensor] = []

    def run() -> None:
        made = forward()
        outputs = [made] if isinstance(made, Tensor) else list(made)
        if not grads:
            grads.extend(torch.full_like(output, 0.1) for output in outputs)
        torch.autograd.backward(outputs, grads)

    return run


def _lora_cases(model: Model, dtype: torch.dtype) -> Iterator[Case]:
    head = model.head_dim
    layers = {
        "up_proj": [model.feed_forward],
        "gate and up": [model.feed_forward] * 2,
        "q, k and v": [model.heads * head, model.key_heads * head, model.key_heads * head],
    }
    for rows in (16, 128, 2048):
        for rank in (16, 64) if rows == 2048 else (16,):
            for name, widths in layers.items():
                yield Case(
                    op="lora_linear",
                    name=f"{model.name} {name}, {rows} rows, r={rank}",
                    dtype=dtype,
                    shape_class=lora_op.shape_class(rows, rank, len(widths)),
                    make=partial(_lora, model, dtype, (rows, rank), widths),
                    is_headline=model is MODELS[0] and (rows, rank, name) == (2048, 16, "up_proj"),
                )


def _lora(model: Model, dtype: torch.dtype, size: tuple[int, int], widths: Sequence[int]) -> dict[str, Run]:
    rows, rank = size
    x = _random(dtype, rows, model.hidden, learnt=True)
    projections = [
        lora_op.Projection(
            weight=_random(dtype, width, model.hidden, scale=0.05),
            a=_random(torch.float32, rank, model.hidden, learnt=True, scale=0.05),
            b=_random(torch.float32, width, rank, learnt=True, scale=0.05),
            scale=2.0,
        )
        for width in widths
    ]
    layers = [_peft_layer(one.weight, rank) for one in projections]

    def side(impl: Side) -> Run:
        return _step(lambda: lora_op.lora_linear_multi(x, projections, impl=impl))

    runs = _sides(side)
    runs["bare frozen linear"] = _step(lambda: [nn.functional.linear(x, one.weight) for one in projections])
    runs["torch.compile"] = _step(
        torch.compile(lambda: lora_op.lora_linear_multi(x, projections, impl="eager"), dynamic=False)
    )
    if layers[0] is not None:
        runs["peft"] = _step(lambda: [layer(x) for layer in layers])
    return runs


def _linear_cases(model: Model, dtype: torch.dtype) -> Iterator[Case]:
    shapes = {"up_proj": (model.hidden, model.feed_forward), "down_proj": (model.feed_forward, model.hidden)}
    for rows in (1, 16, 512):
        for kind in ("no_gradient", "frozen", "trained"):
            for name, (inputs, outputs) in (
                shapes | ({"head": (model.hidden, model.vocab)} if rows < 64 else {})
            ).items():
                x = _random(dtype, rows, inputs, learnt=kind != "no_gradient")
                weight = _random(dtype, outputs, inputs, learnt=kind == "trained", scale=0.05)
                yield Case(
                    op="linear",
                    name=f"{model.name} {name} alone, {rows} rows, {kind}",
                    dtype=dtype,
                    shape_class=linear_op.shape_class(rows, x, weight),
                    make=partial(_linear, x, weight),
                )

    weight = _random(dtype, model.vocab, model.hidden, scale=0.05)
    for rows in (1, 16, 64) if dtype == torch.bfloat16 else ():
        yield Case(
            op="linear",
            name=f"{model.name} head in float32, {rows} rows",
            dtype=dtype,
            shape_class=linear_op.wide_shape_class(rows),
            make=partial(_wide_linear, _random(dtype, rows, model.hidden), weight),
        )


def _linear(x: Tensor, weight: Tensor) -> dict[str, Run]:
    def side(impl: Side) -> Run:
        def forward() -> Tensor:
            return linear_op.linear(x, weight, impl=impl)

        return _step(forward) if x.requires_grad else _alone(forward)

    return _sides(side)


def _wide_linear(x: Tensor, weight: Tensor) -> dict[str, Run]:
    return _sides(lambda impl: _alone(lambda: linear_op.wide_linear(x, weight, impl=impl)))


def _alone(forward: Callable[[], Tensor]) -> Run:
    """Forward, without gradients."""

    def run() -> None:
        with torch.no_grad():
            forward()

    return run


def _grouped_cases(model: Model, dtype: torch.dtype) -> Iterator[Case]:
    for rows, count, ranks in (
        (128, 8, "16"),
        (128, 1, "16"),
        (2048, 1, "16"),
        (2048, 16, "16"),
        (2048, 64, "16"),
        (2048, 64, "4 to 64"),
    ):
        yield Case(
            op="grouped_lora_linear",
            name=f"{model.name} up_proj, {rows} rows of {count} adapters, r={ranks}",
            dtype=dtype,
            shape_class=grouped_op.shape_class(rows, count),
            make=partial(_grouped, model, dtype, (rows, count), ranks),
            is_headline=model is MODELS[0] and (rows, count, ranks) == (2048, 64, "16"),
        )


def _grouped(model: Model, dtype: torch.dtype, size: tuple[int, int], ranks: str) -> dict[str, Run]:
    rows, count = size
    x = _random(dtype, rows, model.hidden, learnt=True)
    weight = _random(dtype, model.feed_forward, model.hidden, scale=0.05)

    def adapter(rank: int) -> grouped_op.LoraAdapter:
        return grouped_op.LoraAdapter(
            a=_random(torch.float32, rank, model.hidden, learnt=True, scale=0.05),
            b=_random(torch.float32, model.feed_forward, rank, learnt=True, scale=0.05),
            scale=2.0,
        )

    adapters = [adapter(16 if ranks == "16" else (4, 8, 16, 64)[index % 4]) for index in range(count)]
    segments = [grouped_op.Segment(num_rows=rows // count, adapter=index) for index in range(count)]
    whole = [grouped_op.Segment(num_rows=rows, adapter=0)]

    def side(impl: Side) -> Run:
        return _step(lambda: grouped_op.grouped_lora_linear(x, weight, None, adapters, segments, impl=impl))

    def alone() -> Tensor:
        return grouped_op.grouped_lora_linear(x, weight, None, [adapter_16], whole, impl="cpu")

    adapter_16 = adapter(16)
    return _sides(side) | {"one adapter": _step(alone)}


def _peft_layer(weight: Tensor, rank: int) -> Any:
    if importlib.util.find_spec("peft") is None:
        return None
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    linear.weight.data = weight
    linear.weight.requires_grad = False
    config = LoraConfig(r=rank, lora_alpha=2 * rank)
    layer = Linear(linear, "default", config=config, r=rank, lora_alpha=2 * rank)
    # PEFT's default: adapters in float32.
    layer.lora_A.float()
    layer.lora_B.float()
    return layer


def _loss_cases(model: Model, dtype: torch.dtype) -> Iterator[Case]:
    for rows in (32, 512, 2048) if model is MODELS[0] else (32, 512) if model is SMALL else (512,):
        for vocab in (1024, model.vocab) if model in (MODELS[0], SMALL) and rows < 2048 else (model.vocab,):
            for op, is_trained in product(("linear_cross_entropy", "linear_logprob"), (False, True)):
                kind = "trained head" if is_trained else "head"
                yield Case(
                    op=op,
                    name=f"{model.name} {kind}, {rows} rows, vocabulary {vocab}",
                    dtype=dtype,
                    shape_class=loss_op.shape_class(rows, vocab, is_trained=is_trained),
                    make=partial(_loss, model, dtype, rows, vocab, op, kind),
                    is_headline=(op, kind, rows, vocab)
                    == ("linear_cross_entropy", "head", 512, MODELS[0].vocab),
                )


def _loss(model: Model, dtype: torch.dtype, rows: int, vocab: int, op: str, kind: str) -> dict[str, Run]:
    hidden = _random(dtype, rows, model.hidden, learnt=True)
    weight = _random(dtype, vocab, model.hidden, learnt=kind == "trained head", scale=0.05)
    target = torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(1))
    if op == "linear_logprob":

        def logprob(impl: Side) -> Run:
            return _step(lambda: linear_logprob(hidden, weight, target, impl=impl).logprob)

        return _sides(logprob) | _trl_loss(hidden, weight, target)

    def side(impl: Side) -> Run:
        return _step(lambda: loss_op.linear_cross_entropy(hidden, weight, target, impl=impl).loss_sum)

    def plain() -> Tensor:
        return nn.functional.cross_entropy(
            nn.functional.linear(hidden, weight).float(), target, reduction="sum"
        )

    runs = {
        **_sides(side),
        "torch.compile": _step(torch.compile(plain, dynamic=False)),
    }
    fused = getattr(nn.functional, "linear_cross_entropy", None)
    if fused is not None:
        runs["F.linear_cross_entropy"] = _step(lambda: fused(hidden, weight, target, reduction="sum"))
    return runs | _trl_loss(hidden, weight, target)


def _trl_loss(hidden: Tensor, weight: Tensor, target: Tensor) -> dict[str, Run]:
    """The chunked log-probabilities of TRL, which its losses are made of; nothing where TRL is not installed.

    The loss of cut-cross-entropy is not here: it needs Triton to be imported, and its form without Triton is
    `torch.compile` of the plain loss, which is.
    """
    if importlib.util.find_spec("trl") is None:
        return {}
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    # As TRL 1.16 calls it: no bias, temperature 1, 32,768 columns of the vocabulary at a time, no softcap, no scale.
    options = (None, target, 1.0, 32768, None, 1.0, ())
    return {"TRL chunked": _step(lambda: ChunkedLogProbFunction.apply(hidden, weight, *options)[0])}


LENGTHS = {
    "64": [64] * 32,
    "512": [512] * 4,
    "mixed 64-512": [100, 300, 64, 512, 200, 400, 250, 222],
    "2048": [2048],
}


def _attention_cases(model: Model, dtype: torch.dtype) -> Iterator[Case]:
    for name, lengths in LENGTHS.items():
        yield Case(
            op="attention_varlen",
            name=f"{model.name} attention, lengths {name}",
            dtype=dtype,
            shape_class=attention_op.shape_class(max(lengths)),
            make=partial(_attention, model, dtype, lengths),
            is_headline=model is MODELS[0] and name == "mixed 64-512",
        )


def _attention(model: Model, dtype: torch.dtype, lengths: list[int]) -> dict[str, Run]:
    bounds = [0, *accumulate(lengths)]
    query, key, value = (
        _random(dtype, bounds[-1], count, model.head_dim, learnt=True)
        for count in (model.heads, model.key_heads, model.key_heads)
    )
    # The mask of the whole row, as a model without packed attention would take it.
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = (owner[:, None] == owner) & torch.ones(bounds[-1], bounds[-1], dtype=torch.bool).tril()

    def masked() -> Tensor:
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    def side(impl: Side) -> Run:
        return _step(lambda: attention_op.attention_varlen(query, key, value, bounds, impl=impl))

    assert all(start < end for start, end in pairwise(bounds))
    return {**_sides(side), "SDPA with a block mask": _step(masked)}


def _elementwise_cases(model: Model, dtype: torch.dtype) -> Iterator[Case]:
    for rows in (16, 2048):
        size = "few_rows" if rows < 64 else "many_rows"
        for op, make in (("rms_norm", _norm), ("rope", _rope), ("gated_activation", _gated)):
            yield Case(
                op=op,
                name=f"{model.name} {op}, {rows} rows",
                dtype=dtype,
                shape_class=size,
                make=partial(make, model, dtype, rows),
            )


def _norm(model: Model, dtype: torch.dtype, rows: int) -> dict[str, Run]:
    x, weight = _random(dtype, rows, model.hidden, learnt=True), _random(dtype, model.hidden)

    def as_transformers() -> Tensor:
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(dtype)

    def side(impl: Side) -> Run:
        return _step(lambda: rms_norm(x, weight, 1e-5, impl=impl))

    return {**_sides(side), "transformers": _step(as_transformers)}


def _rope(model: Model, dtype: torch.dtype, rows: int) -> dict[str, Run]:
    x = _random(dtype, rows, model.heads, model.head_dim, learnt=True)
    cos, sin = (_random(dtype, rows, model.head_dim) for _ in range(2))
    return _sides(lambda impl: _step(lambda: rope(x, cos, sin, impl=impl)))


def _gated(model: Model, dtype: torch.dtype, rows: int) -> dict[str, Run]:
    gate, up = (_random(dtype, rows, model.feed_forward, learnt=True) for _ in range(2))
    return _sides(lambda impl: _step(lambda: swiglu(gate, up, impl=impl)))
