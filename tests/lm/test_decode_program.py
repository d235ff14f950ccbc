"""Passes over caches as a program: what modules compute, for which models, and with which weights."""

from __future__ import annotations

import copy
import gc
import importlib
import weakref
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from tests.lm.engine_requests import PROMPTS, with_adapter
from torch import nn
from transformers import SmolLM3Config, SmolLM3ForCausalLM

from luthier.errors import InvalidArgument
from luthier.kernels.tables import force_impl
from luthier.lm import decode_program
from luthier.lm.attention import IMPLEMENTATION
from luthier.lm.blocks import Linear, use_kernels
from luthier.lm.decode_program import DecodeProgram
from luthier.lm.decoding import Batch
from luthier.lm.generate import GenerationRequest
from luthier.lm.lora import muted, remove_adapter, use_adapter
from luthier.lm.passes import forward_together
from luthier.lm.precision import Precision
from luthier.lm.quantise import quantise_linears

ModelMaker = Callable[..., Any]
Runs = list[tuple[int, DecodeProgram]]
NUM_TOKENS = sum(map(len, PROMPTS))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    """The programs that ran, and with how many rows."""
    noted: Runs = []
    original = DecodeProgram.run

    def noting(program: DecodeProgram, hidden: Any, *others: Any) -> Any:
        noted.append((len(hidden), program))
        return original(program, hidden, *others)

    monkeypatch.setattr(DecodeProgram, "run", noting)
    return noted


def with_kernels(model: Any, dtype: torch.dtype = torch.float32) -> Any:
    use_kernels(model.to(dtype))
    return model


def read(model: Any, **changes: Any) -> Batch:
    """A request whose prompts are read."""
    settings: dict[str, Any] = {"request_id": "r", "prompts": PROMPTS, "max_new_tokens": 20}
    batch = Batch(model, GenerationRequest(**(settings | changes)), None, None)
    for _ in batch.read(1000):
        pass
    return batch


@torch.inference_mode()
def logits_of(model: Any, num_tokens: int = 3, **changes: Any) -> torch.Tensor:
    """The logits of a few tokens that follow the prompts, of every row."""
    batch, found = read(model, **changes), []
    for _ in range(num_tokens):
        found.append(forward_together(model, [batch.next_pass()])[0])
        batch._tokens = [7 + row for row in range(len(found[-1]))]
    return torch.stack(found)


def by_modules(monkeypatch: pytest.MonkeyPatch, run: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What a function gives where no program runs."""
    module: Any = importlib.import_module("luthier.lm.passes")
    with monkeypatch.context() as patched:
        patched.setattr(module, "decode", lambda *_: None)
        return run()


def smollm3(**changes: Any) -> Any:
    shape: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "initializer_range": 0.3,
    }
    make_config: Any = SmolLM3Config
    config = make_config(**(shape | changes), attn_implementation=IMPLEMENTATION)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model: Any = SmolLM3ForCausalLM(config)
        return model.eval().requires_grad_(requires_grad=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("adapter", [None, "a"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "smollm3"])
def test_a_program_computes_what_modules_compute(
    tiny_model: ModelMaker,
    monkeypatch: pytest.MonkeyPatch,
    runs: Runs,
    family: str,
    adapter: str | None,
    dtype: torch.dtype,
) -> None:
    model = with_kernels(smollm3() if family == "smollm3" else tiny_model(family), dtype)
    if adapter is not None:
        with_adapter(model, adapter, 1)
    with use_adapter(model, adapter):
        wanted = by_modules(monkeypatch, lambda: logits_of(model))
        assert not runs
        found = logits_of(model)
    assert [rows for rows, _ in runs] == [NUM_TOKENS, *[len(PROMPTS)] * 3]
    close = 1e-4 if dtype == torch.float32 else 0.06
    assert (found - wanted).norm() <= close * wanted.norm()
    base = logits_of(model)
    assert torch.equal(base, found) == (adapter is None)


@pytest.mark.parametrize("adapter", [None, "a"])
@pytest.mark.parametrize("precision", ["INT8", "NF4"])
def test_a_program_multiplies_with_quantised_weights_as_modules_do(
    tiny_model: ModelMaker,
    monkeypatch: pytest.MonkeyPatch,
    runs: Runs,
    precision: Precision,
    adapter: str | None,
) -> None:
    model = tiny_model().to(torch.bfloat16)
    plain = logits_of(with_kernels(copy.deepcopy(model), torch.bfloat16))
    runs.clear()
    quantise_linears(model, precision, "cpu")
    use_kernels(model)
    if adapter is not None:
        with_adapter(model, adapter, 1)
    with use_adapter(model, adapter):
        wanted = by_modules(monkeypatch, lambda: logits_of(model))
        assert not runs
        found = logits_of(model)
    assert [rows for rows, _ in runs] == [NUM_TOKENS, *[len(PROMPTS)] * 3]
    assert (found - wanted).norm() <= 0.06 * wanted.norm()
    assert not torch.equal(found, plain)


def test_a_program_is_made_once_and_anew_for_more_rows(tiny_model: ModelMaker, runs: Runs) -> None:
    model = with_kernels(tiny_model())
    logits_of(model)
    few = logits_of(model, num_tokens=1, prompts=PROMPTS[:1])
    many = logits_of(model, num_tokens=1, prompts=PROMPTS[:1] * 70)
    assert torch.equal(few.expand(-1, 70, -1), many), "rows know nothing of each other"
    programs = [program for _, program in runs]
    assert len(set(map(id, programs))) == 2
    assert [program.num_rows for program in (programs[0], programs[-1])] == [64, 512]


def test_weights_that_change_in_place_or_are_replaced_are_read(tiny_model: ModelMaker, runs: Runs) -> None:
    model = with_kernels(tiny_model())
    with_adapter(model, "a", 1)
    layer = model.base_model.layers[1]
    with use_adapter(model, "a"):
        seen = [logits_of(model)]
        layer.self_attn.v_proj.lora_B["a"].data.mul_(2.0)
        seen.append(logits_of(model))
        layer.mlp.down_proj.weight.data.mul_(2.0)
        seen.append(logits_of(model))
        same = len(set(map(id, (program for _, program in runs))))
        assert same == 1
        layer.mlp.gate_proj.weight = nn.Parameter(layer.mlp.gate_proj.weight * 2, requires_grad=False)
        seen.append(logits_of(model))
        layer.input_layernorm.weight.data = layer.input_layernorm.weight * 2
        seen.append(logits_of(model))
    assert len(set(map(id, (program for _, program in runs)))) == 3
    assert not any(torch.equal(before, after) for before, after in pairwise(seen))


def test_what_no_program_knows_goes_module_by_module(tiny_model: ModelMaker, runs: Runs) -> None:
    model = with_kernels(tiny_model())
    with_adapter(model, "dora", 1, use_dora=True)
    with use_adapter(model, "dora"):
        logits_of(model)
    with use_adapter(model, None):
        with muted(model):
            logits_of(model)
        assert not runs
        force_impl("eager")
        try:
            logits_of(model)
        finally:
            force_impl("auto")
        assert not runs
        logits_of(model)
        assert len(runs) == 4
    runs.clear()
    logits_of(tiny_model())
    hooked = with_kernels(tiny_model())
    hooked.base_model.layers[1].mlp.register_forward_hook(lambda *_: None)
    logits_of(hooked)
    logits_of(with_kernels(tiny_model()).double())
    assert not runs


def test_a_pass_that_keeps_gradients_goes_module_by_module(tiny_model: ModelMaker, runs: Runs) -> None:
    model = with_kernels(tiny_model())
    with torch.no_grad():
        batch = read(model)
    runs.clear()
    weight = model.base_model.layers[0].self_attn.q_proj.weight.requires_grad_()
    (logits,) = forward_together(model, [batch.next_pass()])
    assert not runs
    (gradient,) = torch.autograd.grad(logits.sum(), weight)
    assert gradient.any(), "queries of attention over a cache have one"
    weight.requires_grad_(requires_grad=False)
    with torch.no_grad():
        forward_together(model, [batch.next_pass()])
    assert len(runs) == 1


def test_rows_that_outgrow_a_window_are_refused(tiny_model: ModelMaker, runs: Runs) -> None:
    model = with_kernels(tiny_model("mistral", sliding_window=10))
    with pytest.raises(InvalidArgument, match="window of 10 tokens, got 11"):
        logits_of(model, num_tokens=4)
    assert [rows for rows, _ in runs] == [NUM_TOKENS, *[4] * 3]
    assert decode_program._programs[model]


def test_programs_of_a_few_adapters_are_kept_and_go_with_their_model(
    tiny_model: ModelMaker, runs: Runs
) -> None:
    model = with_kernels(tiny_model())
    names = [f"a{number}" for number in range(6)]
    for name in names:
        with_adapter(model, name, 1)
        with use_adapter(model, name):
            logits_of(model, num_tokens=1)
    assert list(decode_program._programs[model]) == names[-4:]
    before = len(decode_program._programs)
    del model
    assert len(decode_program._programs) < before


def same_as_modules(monkeypatch: pytest.MonkeyPatch, model: Any, found: torch.Tensor) -> None:
    wanted = by_modules(monkeypatch, lambda: logits_of(model))
    assert (found - wanted).norm() <= 1e-4 * wanted.norm()


def halved(layer: nn.Linear) -> nn.Module:
    """Another module in place of one, with weights of its own."""
    other = nn.Linear(layer.in_features, layer.out_features, bias=False)
    other.weight = nn.Parameter(layer.weight / 2, requires_grad=False)
    return Linear(other)


def quiet_layer(model: Any) -> None:
    """Another layer in place of the second."""
    layer = copy.deepcopy(model.base_model.layers[1])
    layer.mlp.down_proj.weight.zero_()
    model.base_model.layers[1] = layer


def bolder_norm(model: Any) -> None:
    norm = copy.deepcopy(model.base_model.norm)
    norm.offset = 1.0
    model.base_model.norm = norm


def swapped_attention(model: Any) -> None:
    layer = model.base_model.layers[0]
    layer.self_attn = copy.deepcopy(layer.self_attn)
    layer.self_attn.o_proj.weight.mul_(3)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.set_submodule(
            "model.layers.1.mlp.down_proj", halved(model.base_model.layers[1].mlp.down_proj)
        ),
        quiet_layer,
        swapped_attention,
        lambda model: model.base_model.layers.pop(1),
        bolder_norm,
    ],
    ids=["linear", "layer", "attention", "fewer layers", "norm"],
)
@torch.no_grad()
def test_modules_that_take_the_place_of_others_are_what_runs(
    tiny_model: ModelMaker, monkeypatch: pytest.MonkeyPatch, runs: Runs, change: Callable[[Any], Any]
) -> None:
    model = with_kernels(tiny_model())
    before = logits_of(model)
    change(model)
    found = logits_of(model)
    assert not torch.equal(found, before)
    assert len(set(map(id, (program for _, program in runs)))) == 2
    same_as_modules(monkeypatch, model, found)


def test_an_adapter_that_comes_back_as_another_is_what_runs(
    tiny_model: ModelMaker, monkeypatch: pytest.MonkeyPatch, runs: Runs
) -> None:
    """Magnitudes, which no program knows, stand between two that programs know."""
    model = with_kernels(tiny_model())
    known = []
    for seed, dora in ((1, False), (2, True), (3, False)):
        with_adapter(model, "a", seed, use_dora=dora)
        with use_adapter(model, "a"):
            runs.clear()
            found = logits_of(model)
            known.append(len(runs))
            same_as_modules(monkeypatch, model, found)
            if not dora:
                layer = model.base_model.layers[0].self_attn.q_proj
                layer.scales["a"] *= 4
                assert not torch.equal(logits_of(model), found)
                same_as_modules(monkeypatch, model, logits_of(model))
        remove_adapter(model, "a")
        assert "a" not in decode_program._programs[model]
    assert known == [4, 0, 4]


def test_who_listens_is_heard_as_long_as_it_listens(tiny_model: ModelMaker, runs: Runs) -> None:
    """Hooks and forwards that come after the first pass; what could not be a program is one again without them."""
    model = with_kernels(tiny_model())
    heard: list[str] = []
    before = logits_of(model)
    inner = model.base_model
    for module in (inner, inner.norm, inner.layers[1], inner.layers[0].mlp.down_proj):
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            handle = register(lambda *_: heard.append("hook"))
            runs.clear()
            logits_of(model, num_tokens=1)
            assert not runs
            assert heard.pop() == "hook"
            handle.remove()
            heard.clear()
            assert torch.equal(logits_of(model), before)
            assert len(runs) == 4
    runs.clear()
    original = inner.norm.forward
    inner.norm.forward = lambda x: original(x) * 2
    assert not torch.equal(logits_of(model), before)
    assert not runs
    del inner.norm.forward
    assert torch.equal(logits_of(model), before)


def test_what_was_replaced_or_removed_is_not_kept_by_programs(tiny_model: ModelMaker, runs: Runs) -> None:
    model = with_kernels(tiny_model())
    with_adapter(model, "a", 1)
    with use_adapter(model, "a"):
        logits_of(model, num_tokens=1)
    logits_of(model, num_tokens=1)
    factor = weakref.ref(model.base_model.layers[0].self_attn.q_proj.lora_B["a"])
    runs.clear()
    remove_adapter(model, "a")
    gc.collect()
    assert factor() is None, "an adapter's memory is free when it is gone"
    down = model.base_model.layers[1].mlp.down_proj
    old = weakref.ref(down.weight)
    with_adapter(model, "b", 2)
    with use_adapter(model, "b"):
        logits_of(model, num_tokens=1)
        runs.clear()
    down = model.base_model.layers[1].mlp.down_proj
    down.weight = nn.Parameter(down.weight * 2, requires_grad=False)
    with use_adapter(model, "b"):
        logits_of(model, num_tokens=1)
        runs.clear()
    del down
    gc.collect()
    assert old() is None, "the base's program goes too, though nobody runs it"
