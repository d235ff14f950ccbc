"""Tiny random models, made on the spot, and nothing else."""

from collections.abc import Callable

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from luthier.lm.attention import IMPLEMENTATION

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # Far from the default 0.02, so that attention and the greedy choice depend on the input.
    "initializer_range": 0.3,
}
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
}

ModelMaker = Callable[..., PreTrainedModel]


@pytest.fixture
def tiny_model() -> ModelMaker:
    """Makes a two-layer float32 model of a family; equal arguments give equal weights."""

    def make(family: str = "llama", attention: str = IMPLEMENTATION, **changes: object) -> PreTrainedModel:
        config_class, model_class = FAMILIES[family]
        shape = dict(SHAPE)
        if family == "qwen3":
            shape["head_dim"] = 8
        config = config_class(**(shape | changes), attn_implementation=attention)
        with torch.random.fork_rng():
            torch.manual_seed(7)
            model = model_class(config)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(parameter.numel()))
        model.eval().requires_grad_(requires_grad=False)
        assert isinstance(model, PreTrainedModel)
        return model

    return make


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
