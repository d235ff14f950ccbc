"""Loading once for practice, so that the first model that counts is not the first for transformers and torch."""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.lm.load import load_model


def rehearse() -> None:
    """Load a model of one tiny layer on the processor and let go of it: 0.3 s that a process spends once.

    They are imports and tables of expressions that transformers makes at the first load. No random number of torch's is
    used up, and no other device is opened.
    """
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=8,
        architectures=["LlamaForCausalLM"],
        dtype=torch.bfloat16,
    )
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=()):
        config.save_pretrained(folder)
        weights = LlamaForCausalLM(config).bfloat16().state_dict()
        save_file(dict(weights), Path(folder) / "model.safetensors", {"format": "pt"})
        load_model(Path(folder))
