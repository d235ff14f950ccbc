"""Two-layer random models with their tokenizers, as folders."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.lm.adapter_files import adapter_state, save_adapter
from luthier.lm.load import load_model
from luthier.lm.lora import LoraSpec, insert_lora

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


TRAINED_ON = "what colour has the thing and what is its number"


def write_tokenizer(folder: Path, trained_on: str = TRAINED_ON) -> None:
    """Write a byte-level BPE tokenizer with a ChatML template; another text makes other tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([trained_on] * 4, trainer)
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def write_base(folder: Path, seed: int, hidden_size: int = 32) -> None:
    """Write a random two-layer Llama in transformers' layout."""
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 3 // 2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        # Far from the default 0.02, so that what is said depends on what is asked.
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    write_tokenizer(folder)


def write_adapter(base: Path, folder: Path, seed: int, trained_modules: tuple[str, ...] = ()) -> None:
    """Write a random adapter of a base model, and of the modules that it trains whole random weights."""
    model = load_model(base)
    spec = LoraSpec(rank=4, alpha=16, targets="all-linear", trained_modules=trained_modules)
    insert_lora(model, spec, seed=seed, name="a")
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in adapter_state(model, "a").items():
        if "lora_A" not in name:  # B begins as zero, with which the adapter would change nothing
            tensor.normal_(std=0.3, generator=generator)
    save_adapter(model, "a", folder)


def write_null_adapter(base: Path, folder: Path) -> None:
    """Write an adapter that changes nothing."""
    model = load_model(base)
    insert_lora(model, LoraSpec(rank=4, alpha=16, targets="all-linear"), seed=0, name="a")
    save_adapter(model, "a", folder)
