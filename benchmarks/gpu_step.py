"""A whole LoRA training step for `gpu.py`: a model of random weights on one packed row, by ours and by its peers.

All contenders share one base model, which is frozen, and begin with the same adapter.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from gpu_meter import EAGER, OURS, Contender, Problem, Program
from gpu_models import Model, Setting
from gpu_peers import LIGER, PEFT
from sft_step_loop import packed_inputs
from sft_step_task import ADAPTER, LEARNING_RATE, MAX_GRAD_NORM, WEIGHT_DECAY, Row
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config

from luthier.kernels.tables import Impl, force_impl
from luthier.lm.attention import IMPLEMENTATION
from luthier.lm.blocks import use_kernels
from luthier.lm.lora import Adapter, LoraSpec, adapter_parameters, attach, target_modules
from luthier.lm.lora_layer import Factors
from luthier.lm.packed import WEIGHT, PackedBatch, named_positions, pack
from luthier.lm.readouts import FusedLoss
from luthier.training.recipes.engine import Engine, OptimiserSettings
from luthier.training.recipes.objectives import supervised
from luthier.training.recipes.weights import Adapter as AdapterWeights

OP = "training_step"
_CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config}


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What all contenders are given: a frozen base, an adapter's factors by module, and the rows."""

    base: PreTrainedModel
    spec: LoraSpec
    factors: Mapping[str, tuple[Tensor, Tensor]]
    rows: tuple[Row, ...]
    device: str

    @property
    def batch(self) -> PackedBatch:
        """The rows as our own step takes them."""
        supervised = [row.supervised for row in self.rows]
        return pack([row.ids for row in self.rows], {WEIGHT: supervised}).to(self.device)


def problem(model: Model, setting: Setting) -> Problem:
    """A model's step: forward, backward, clipping and AdamW on one pack of rows."""
    work = make_work(model, setting)
    peft = partial(_peft, work)
    return Problem(
        dtype=setting.dtype,
        operations=operations(model, setting),
        reference=lambda: _ours(work, "eager", is_wide=True),
        contenders={
            OURS: Contender(lambda: _ours(work, "triton"), {}),
            EAGER: Contender(lambda: _ours(work, "eager"), {}),
            "PEFT": Contender(peft, PEFT),
            "torch.compile (PEFT)": Contender(lambda: peft(backend=setting.backend), PEFT),
            "Liger (PEFT)": Contender(lambda: peft(liger=model.kind), LIGER | PEFT),
        },
    )


def operations(model: Model, setting: Setting) -> int:
    """Operations of products that a step with LoRA has to make, two for each multiplication and addition.

    Nothing is counted that is computed twice, and of attention what each token sees alone: a frozen weight is
    multiplied with forward and for the input's gradient, a factor once more for its own. Nothing asks for the gradient
    of the first layer's input, which is its norm's and so of q, k and v.
    """
    E, F = model.hidden, model.feed_forward
    queries, keys = model.heads * model.head_dim, model.key_heads * model.head_dim
    first = [(E, queries), (E, keys), (E, keys)]
    linears = [*first, (queries, E), (E, F), (E, F), (F, E)]

    def frozen(of: list[tuple[int, int]]) -> int:
        return sum(inputs * outputs for inputs, outputs in of)

    def factors(of: list[tuple[int, int]]) -> int:
        return setting.rank * sum(inputs + outputs for inputs, outputs in of)

    of_token = model.layers * (2 * frozen(linears) + 3 * factors(linears))
    of_token -= frozen(first) + setting.rank * sum(inputs for inputs, _ in first)
    seen = sum(length * (length + 1) // 2 for length in setting.lengths)
    attention = 3 * 2 * model.layers * queries * seen
    learnt = sum(length - max(1, length // 2) for length in setting.lengths)
    return 2 * (setting.tokens * of_token + attention + 2 * learnt * model.vocab * E)


def make_work(model: Model, setting: Setting) -> Work:
    """A base model of random weights on the device, and what goes with it."""
    config = _CONFIGS[model.kind](
        vocab_size=model.vocab,
        hidden_size=model.hidden,
        intermediate_size=model.feed_forward,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.key_heads,
        head_dim=model.head_dim,
        max_position_embeddings=4096,
        tie_word_embeddings=model.is_tied,
    )
    spec = LoraSpec(rank=setting.rank, alpha=2 * setting.rank)
    torch.manual_seed(0)
    with torch.device(setting.device):
        base = AutoModelForCausalLM.from_config(config, dtype=setting.dtype)  # type: ignore[no-untyped-call]
        base.requires_grad_(requires_grad=False)
        factors = {}
        for name in target_modules(base, "all-linear"):
            outputs, inputs = base.get_submodule(name).weight.shape
            a_RI = torch.randn(setting.rank, inputs) * inputs**-0.5
            factors[name] = (a_RI, torch.randn(outputs, setting.rank) * 0.01)
        words = torch.randint(model.vocab, (setting.tokens,)).tolist()
    rows = []
    for length in setting.lengths:
        ids, words = words[:length], words[length:]
        # As in a conversation: what comes first is given, the other half learnt.
        rows.append(Row(ids=tuple(ids), supervised=tuple(at >= length // 2 for at in range(length))))
    return Work(base=base, spec=spec, factors=factors, rows=tuple(rows), device=setting.device)


def _sharing(base: PreTrainedModel) -> PreTrainedModel:
    """A model of modules of its own on the very weights of another."""
    kept = {id(tensor): tensor for tensor in [*base.parameters(), *base.buffers()]}
    return copy.deepcopy(base, kept)


def _ours(work: Work, impl: Impl, *, is_wide: bool = False) -> Program:
    """Our own engine on modules that run our kernels, or with `eager` their references."""
    base: Any = work.base
    model: Any = copy.deepcopy(base).float() if is_wide else _sharing(work.base)
    model.set_attn_implementation(IMPLEMENTATION)
    use_kernels(model)
    adapter = Adapter(name=ADAPTER, spec=work.spec, modules=tuple(sorted(work.factors)))
    attach(model, adapter, {name: Factors(a.clone(), b.clone()) for name, (a, b) in work.factors.items()}, {})
    settings = OptimiserSettings(weight_decay=WEIGHT_DECAY, max_grad_norm=MAX_GRAD_NORM)
    engine = Engine(AdapterWeights(model, ADAPTER, base_model=""), settings, model.device)
    if is_wide:
        # Else the float32 copy of a model of 8B leaves no room for its activations.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    parameters = adapter_parameters(model, ADAPTER)
    batch = work.batch
    learnt = named_positions(batch, WEIGHT).numel()

    def accumulate() -> float:
        with _forced(impl):
            return engine.accumulate(batch, FusedLoss(), supervised(learnt))["train_loss"]

    def results() -> list[Tensor]:
        loss = accumulate() / learnt
        return _compared(loss, parameters)

    def run() -> None:
        accumulate()
        engine.update(LEARNING_RATE)

    return Program(results=results, run=run, restore=_nothing)


def _peft(work: Work, *, backend: str = "", liger: str = "") -> Program:
    """Transformers and PEFT in a plain loop, compiled with a backend, or patched by Liger for a kind of model."""
    from peft import LoraConfig, get_peft_model

    base = _sharing(work.base)
    patched = _liger_patch(base, liger) if liger else nullcontext
    config = LoraConfig(r=work.spec.rank, lora_alpha=int(work.spec.alpha), target_modules=list(work.factors))
    model = cast(Any, get_peft_model(base, config))
    model.train()
    parameters = {}
    for name, pair in work.factors.items():
        for part, factor in zip(("lora_A", "lora_B"), pair, strict=True):
            parameter = model.get_parameter(f"base_model.model.{name}.{part}.default.weight")
            parameter.data.copy_(factor)
            parameters[f"{name}.{part}"] = parameter
    inputs = {name: one.to(work.device) for name, one in packed_inputs(list(work.rows)).items()}
    learnt = inputs["labels"].ne(-100).sum()
    forward = torch.compile(model, backend=backend) if backend else model
    optimiser = torch.optim.AdamW(parameters.values(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def accumulate() -> Tensor:
        with patched():
            loss: Tensor = forward(**inputs, use_cache=False, num_items_in_batch=learnt).loss
            torch.autograd.backward(loss)
        return loss.detach()

    def run() -> None:
        accumulate()
        torch.nn.utils.clip_grad_norm_(parameters.values(), MAX_GRAD_NORM)
        optimiser.step()
        optimiser.zero_grad()

    return Program(results=lambda: _compared(accumulate().item(), parameters), run=run, restore=_nothing)


def _compared(loss: float, parameters: Mapping[str, Tensor]) -> list[Tensor]:
    """The loss, and the gradients of all A's and all B's as one vector each; gradients are zero after that."""
    vectors = []
    for part in ("lora_A", "lora_B"):
        grads = [parameters[name].grad for name in sorted(parameters) if name.endswith(part)]
        assert all(grad is not None for grad in grads)
        vectors.append(torch.cat([grad.detach().flatten() for grad in grads if grad is not None]))
    for parameter in parameters.values():
        assert parameter.grad is not None
        parameter.grad.zero_()
    return [torch.tensor([loss]), *vectors]


def _nothing() -> None:
    """A step goes on from where the last one ended."""


@contextmanager
def _forced(impl: Impl) -> Iterator[None]:
    force_impl(impl)
    try:
        yield
    finally:
        force_impl("auto")


def _liger_patch(model: PreTrainedModel, kind: str) -> Callable[[], Any]:
    """Patch a model by Liger; what that changes in transformers' module holds only within the context returned.

    Else rotary positions, which Liger replaces for all models, would be Liger's in the others' steps too.
    """
    from liger_kernel import transformers as liger

    module = sys.modules[type(model).__module__]
    before = dict(vars(module))
    getattr(liger, f"apply_liger_kernel_to_{kind}")(model=model)
    changed = {name: one for name, one in vars(module).items() if before.get(name) is not one}
    original = {name: before[name] for name in changed}
    vars(module).update(original)

    @contextmanager
    def patched() -> Iterator[None]:
        vars(module).update(changed)
        try:
            yield
        finally:
            vars(module).update(original)

    return patched
