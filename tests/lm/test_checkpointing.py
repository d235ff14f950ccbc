"""Activation checkpointing: the same bits, less memory, and nothing computed again but what was not kept."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from luthier.kernels.attention_varlen import cpu as attention
from luthier.kernels.lora_linear import cpu as lora_linear
from luthier.kernels.rms_norm import cpu as rms_norm
from luthier.kernels.tables import force_impl
from luthier.lm.attention import IMPLEMENTATION
from luthier.lm.blocks import use_kernels
from luthier.lm.checkpointing import checkpoint_layers, checkpointed_layers
from luthier.lm.kept import CHECKPOINTINGS, Checkpointing
from luthier.lm.lora import LoraSpec, activate, adapter_parameters, dropping, insert_lora
from luthier.lm.memory import give_back
from luthier.lm.packed import WEIGHT, PackedBatch, pack
from luthier.lm.readouts import FusedLoss, read

ModelMaker = Callable[..., PreTrainedModel]
TEXTS = [[5, 9, 11, 40, 3, 17], [8, 8, 21, 60], [30, 31, 32, 33, 34, 35, 36]]


@pytest.fixture(params=["cpu", "eager"])
def _on(request: pytest.FixtureRequest) -> Iterator[None]:
    """Our kernels, or torch alone."""
    force_impl(request.param)
    yield
    force_impl("auto")


def batch() -> PackedBatch:
    return pack(TEXTS, {WEIGHT: [[1.0] * len(text) for text in TEXTS]}, rows=[4, 7, 9])


def summed(model: PreTrainedModel, packed: PackedBatch) -> Any:
    """The loss of a pass."""
    return read(model, packed, FusedLoss()).loss_sum


def with_adapter(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """Our modules, and an adapter that counts for something."""
    use_kernels(model)
    insert_lora(model, LoraSpec(rank=4, alpha=8.0), seed=11)
    activate(model, "default")
    generator = torch.Generator().manual_seed(1)
    parameters = adapter_parameters(model, "default")
    for parameter in parameters.values():
        parameter.data.normal_(std=0.2, generator=generator)
    return parameters


def gradients(model: PreTrainedModel, kept: Checkpointing, dropout: float) -> dict[str, torch.Tensor]:
    parameters = adapter_parameters(model, "default")
    checkpoint_layers(model, kept)
    with dropping(model, batch(), dropout, seed=3):
        total = summed(model, batch())
        total.backward()
    found = {name: one.grad for name, one in parameters.items() if one.grad is not None}
    model.zero_grad(set_to_none=True)
    return {"loss": total.detach(), **found}


@pytest.mark.usefixtures("_on")
@pytest.mark.parametrize("kept", CHECKPOINTINGS[1:])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_gradients_have_the_same_bits_whatever_layers_keep(
    tiny_model: ModelMaker, family: str, kept: Checkpointing, dtype: torch.dtype
) -> None:
    model: Any = tiny_model(family)
    model.to(dtype)
    with_adapter(model)
    plain, found, other = [gradients(model, one, 0.4) for one in ("NONE", kept, "NONE")]
    assert len(plain) == 1 + 2 * 14
    assert all(torch.equal(plain[name], found[name]) for name in plain)
    assert all(torch.equal(plain[name], other[name]) for name in plain), "and so without again"
    assert not torch.equal(plain["loss"], gradients(model, kept, 0.1)["loss"]), "what is dropped counts"


@pytest.mark.parametrize("kept", CHECKPOINTINGS[1:])
def test_all_weights_have_gradients_of_the_same_bits(tiny_model: ModelMaker, kept: Checkpointing) -> None:
    found = []
    for one in ("NONE", kept):
        model = tiny_model().requires_grad_()
        use_kernels(model)
        checkpoint_layers(model, one)
        summed(model, batch()).backward()
        found.append({name: weight.grad for name, weight in model.named_parameters()})
    plain, again = found
    assert len(plain) == 20
    for name, gradient in plain.items():
        assert gradient is not None
        other = again[name]
        assert other is not None
        assert torch.equal(gradient, other), name


def test_only_what_is_not_kept_is_computed_again(
    tiny_model: ModelMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()

    def counting(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def count(*arguments: object) -> object:
            calls[name] += 1
            return function(*arguments)

        return count

    for name, module, function in (
        ("norm", rms_norm, "problem_of"),
        ("attention", attention, "_problem"),
        ("product", lora_linear, "product"),
    ):
        monkeypatch.setattr(module, function, counting(name, getattr(module, function)))
    force_impl("cpu")
    try:
        model = tiny_model()
        with_adapter(model)
        counts = {}
        for kept in CHECKPOINTINGS:
            calls.clear()
            gradients(model, kept, 0.0)
            counts[kept] = dict(calls)
    finally:
        force_impl("auto")
    none, selective, full = (counts[kept] for kept in CHECKPOINTINGS)
    assert none["attention"] == 2 * 2, "two layers, forward and backward"
    assert {**selective, "norm": 0} == {**none, "norm": 0}
    assert selective["norm"] == full["norm"] == none["norm"] + 2 * 2
    assert full["attention"] == 3 * 2
    assert full["product"] > none["product"]


def test_nothing_is_computed_again_without_gradients(tiny_model: ModelMaker) -> None:
    model = tiny_model()
    with_adapter(model)
    with torch.no_grad():
        losses = []
        for kept in CHECKPOINTINGS:
            checkpoint_layers(model, kept)
            losses.append(summed(model, batch()))
    assert len(set(losses)) == 3, "tensors of their own"
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])


def test_names_stay_and_layers_keep_all_again(tiny_model: ModelMaker) -> None:
    model = tiny_model()
    names = list(model.state_dict())
    for kept in ("FULL", "SELECTIVE", "FULL"):
        checkpoint_layers(model, kept)
        assert all("forward" in layer.__dict__ for layer in checkpointed_layers(model))
    assert list(model.state_dict()) == names
    assert len(checkpointed_layers(model)) == 2
    checkpoint_layers(model, "NONE")
    assert not any("forward" in layer.__dict__ for layer in checkpointed_layers(model))


def test_a_deep_model_takes_less_memory() -> None:
    """Twenty layers of 2,048 tokens: what is resident at most, above what was before."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=20,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    config._attn_implementation = IMPLEMENTATION
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16)
    model.eval().requires_grad_(requires_grad=False)
    with_adapter(model)
    texts = [[number % 64 for number in range(256)] for _ in range(8)]
    long = pack(texts, {WEIGHT: [[1.0] * len(text) for text in texts]})
    give_back(torch.device("cpu"))
    grown, before = {}, resident("VmRSS")
    # From the least on: what one pass has freed the next one may find.
    for kept in reversed(CHECKPOINTINGS):
        checkpoint_layers(model, kept)
        Path("/proc/self/clear_refs").write_text("5")
        summed(model, long).backward()
        grown[kept] = resident("VmHWM") - before
    layers, tokens, element = 20, 2048, 2
    # Of each token and layer 6 E + 2 K + 3 F elements, or 5 E + 2 K + 2 F, or E.
    most = layers * tokens * element * (6 * 96 + 2 * 48 + 3 * 288)
    assert grown["NONE"] > 0.8 * most
    assert grown["SELECTIVE"] < 0.85 * grown["NONE"]
    assert grown["FULL"] < 0.4 * grown["NONE"]


def resident(name: str) -> int:
    """Return VmRSS or VmHWM of this process in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024
