"""Sizes read from a config are those of the model that transformers makes of it."""

from typing import Any

import pytest
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from luthier.errors import InvalidArgument
from luthier.lm.lora import target_modules
from luthier.lm.model_config import ARCHITECTURES
from luthier.lm.shape import shape_of

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
KINDS = {name: name.removesuffix("ForCausalLM").lower() for name in ARCHITECTURES}


def counted(name: str, **changes: Any) -> tuple[Any, dict[str, Any]]:
    config = AutoConfig.for_model(KINDS[name], **{**SIZES, **changes})
    model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return model, {**config.to_dict(), "architectures": [name]}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"head_dim": 16}], ids=str)
def test_a_shape_has_the_weights_and_layers_of_the_model(name: str, changes: dict[str, Any]) -> None:
    model, config = counted(name, **changes)
    shape = shape_of(config)
    assert shape.num_parameters == sum(parameter.numel() for parameter in set(model.parameters()))
    assert shape.modules() == target_modules(model, "all-linear")
    for module in shape.modules():
        layer, said = model.get_submodule(module), shape.linear(module)
        assert isinstance(layer, nn.Linear)
        assert (layer.in_features, layer.out_features) == (said.inputs, said.outputs), module
        assert (layer.bias is not None) == said.has_bias, module


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_a_config_does_not_say_is_what_transformers_takes(name: str) -> None:
    config = AutoConfig.for_model(KINDS[name])
    told = {key: getattr(config, key) for key in SIZES if key not in ("num_key_value_heads", "pad_token_id")}
    shape = shape_of({**told, "architectures": [name]})
    assert shape.key_heads == (config.num_key_value_heads or config.num_attention_heads)
    assert shape.head_size == (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    assert shape.is_tied == config.tie_word_embeddings


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Qwen3ForCausalLM"])
def test_biases_are_counted(name: str) -> None:
    model, config = counted(name, attention_bias=True)
    assert shape_of(config).num_parameters == sum(one.numel() for one in set(model.parameters()))


def test_a_config_without_a_size_is_refused() -> None:
    sizes = {key: value for key, value in SIZES.items() if key != "intermediate_size"}
    with pytest.raises(InvalidArgument, match=r"config\.json must say intermediate_size, it does not"):
        shape_of({**sizes, "architectures": ["LlamaForCausalLM"]})
    with pytest.raises(InvalidArgument, match=r"config\.json must say architectures, it does not"):
        shape_of(SIZES)
