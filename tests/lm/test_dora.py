"""DoRA: lengths of rows apart from their directions, as PEFT computes it, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch

from luthier.kernels.dequantise import dense
from luthier.lm.attention import packed_forward
from luthier.lm.lora import LoraSpec, adapter_parameters, insert_lora, muted, use_adapter
from luthier.lm.lora_layer import LoraLinear, row_lengths
from luthier.lm.precision import Precision
from luthier.lm.quantise import quantised

ModelMaker = Callable[..., Any]
IDS = torch.tensor([[5, 9, 11, 40, 3, 17]])
SPEC = LoraSpec(rank=4, alpha=8, use_dora=True)


def fill(model: Any, seed: int = 5) -> None:
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in adapter_parameters(model, "default").items():
        if key.endswith("lora_B"):
            with torch.no_grad():
                parameter.normal_(std=0.2, generator=generator)


def test_it_begins_as_its_base(tiny_model: ModelMaker) -> None:
    model = tiny_model()
    insert_lora(model, SPEC, seed=1)
    base = model(IDS).logits
    with use_adapter(model, "default"):
        torch.testing.assert_close(model(IDS).logits, base, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muted_has_the_bits_of_an_update_of_zero(tiny_model: ModelMaker, dtype: torch.dtype) -> None:
    model = tiny_model("qwen2").to(dtype)
    insert_lora(model, SPEC, seed=1)
    ids, positions = torch.arange(3, 20), torch.arange(17)

    def hidden() -> torch.Tensor:
        with torch.no_grad():
            return packed_forward(model, ids, positions, (0, 17))

    with use_adapter(model, "default"):
        zero = hidden()
        fill(model)
        with muted(model):
            silent = hidden()
        loud = hidden()
    assert torch.equal(silent, zero)
    assert not torch.allclose(loud, zero, rtol=0.1)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_gradients_are_those_of_peft(tiny_model: ModelMaker, family: str) -> None:
    ours, config = (
        tiny_model(family),
        peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", use_dora=True),
    )
    insert_lora(ours, SPEC, seed=1)
    fill(ours)
    theirs: Any = peft.get_peft_model(tiny_model(family), config).train()
    state = {
        f"base_model.model.{key.replace('.lora_magnitude_vector', '.lora_magnitude_vector.default.weight')}": value
        for key, value in adapter_parameters(ours, "default").items()
    }
    state = {
        key if key.endswith(".weight") else f"{key}.default.weight": value for key, value in state.items()
    }
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(state.pop(name).data)
    assert not state
    weights = torch.randn(IDS.shape[1], 97, generator=torch.Generator().manual_seed(2))
    (theirs(IDS).logits[0] * weights).sum().backward()
    with use_adapter(ours, "default"):
        (ours(IDS).logits[0] * weights).sum().backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters() if "lora_" in name}
    for key, parameter in adapter_parameters(ours, "default").items():
        named = f"base_model.model.{key}.default.weight"
        torch.testing.assert_close(parameter.grad, expected[named], rtol=1e-4, atol=1e-4)


def test_lengths_are_those_of_the_rows_however_they_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(*shape, generator=draw) for shape in ((37, 20), (3, 20), (37, 3)))
    expected = (weight + 0.5 * b @ a).norm(dim=1)
    torch.testing.assert_close(row_lengths(weight, a, b, 0.5), expected)
    monkeypatch.setattr("luthier.lm.lora_layer._PIECE_ELEMENTS", 100)
    torch.testing.assert_close(row_lengths(weight, a, b, 0.5), expected)


@pytest.mark.parametrize("precision", ["INT8", "NF4"])
def test_lengths_beside_a_quantised_weight_are_those_of_the_numbers_that_it_stands_for(
    monkeypatch: pytest.MonkeyPatch, precision: Precision
) -> None:
    monkeypatch.setattr("luthier.lm.lora_layer._PIECE_ELEMENTS", 1000)
    draw = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(*shape, generator=draw) for shape in ((64, 128), (3, 128), (64, 3)))
    held = quantised(weight.bfloat16(), precision)
    assert not torch.equal(dense(held).float(), weight.bfloat16().float())
    expected = (dense(held).float() + 0.5 * b @ a).norm(dim=1)
    torch.testing.assert_close(row_lengths(held, a, b, 0.5), expected)


def test_lengths_are_kept_while_nothing_is_learnt_and_never_after_a_change(
    tiny_model: ModelMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    insert_lora(model, LoraSpec(rank=4, alpha=8, targets=("q_proj",), use_dora=True), seed=1)
    fill(model)
    counted = []

    def count(*arguments: Any) -> torch.Tensor:
        counted.append(arguments)
        return row_lengths(*arguments)

    monkeypatch.setattr("luthier.lm.lora_layer.row_lengths", count)
    with use_adapter(model, "default"):
        with torch.no_grad():
            first, second = model(IDS).logits, model(IDS).logits
            assert len(counted) == 2, "once for each of the two layers"
            assert torch.equal(first, second)
            fill(model, seed=6)
            changed = model(IDS).logits
        assert len(counted) == 4
        assert not torch.allclose(changed, first, atol=1e-3)
        model(IDS).logits.sum().backward()
        assert len(counted) == 6
        torch.testing.assert_close(model(IDS).logits, changed, rtol=1e-5, atol=1e-5)


def test_merged_weights_do_what_the_layer_does(tiny_model: ModelMaker) -> None:
    model = tiny_model()
    insert_lora(model, SPEC, seed=1)
    fill(model)
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert isinstance(layer, LoraLinear)
    with torch.no_grad():
        layer.lora_magnitude_vector["default"].mul_(1.5)
        x = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
        with use_adapter(model, "default"):
            torch.testing.assert_close(x @ layer.merged_weight("default").T, layer(x), rtol=1e-5, atol=1e-5)
