"""Folders of tiny models and adapters, as they are merged and exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from luthier.lm.adapter_files import save_adapter
from luthier.lm.load import load_model
from luthier.lm.lora import LoraSpec, adapter_parameters, insert_lora

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = [*SPECIAL, *LETTERS, "th", "the", "Ġthe"]
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the")]
tokenizer_class: Any = PreTrainedTokenizerFast


def bpe(**changes: Any) -> Any:
    """A byte-level BPE that cuts texts as GPT-2 does."""
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(TOKENS)}, merges=MERGES))
    core.pre_tokenizer = changes.pop("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=False))
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    return tokenizer_class(tokenizer_object=core, eos_token="<|im_end|>", chat_template=TEMPLATE, **changes)


def model_folder(model: Any, folder: Path, **changes: Any) -> Path:
    """Write a model with a tokenizer in bfloat16, as registered ones are."""
    model.to(torch.bfloat16).save_pretrained(folder)
    bpe(**changes).save_pretrained(folder)
    return folder


def adapter_folder(base: Path, folder: Path, spec: LoraSpec, *, strength: float = 0.05) -> Path:
    """Write an adapter with updates that are not zero, and weights of its own that are not the base's."""
    model = load_model(base, dtype=torch.float32)
    insert_lora(model, spec, seed=3)
    generator = torch.Generator().manual_seed(5)
    for key, parameter in adapter_parameters(model, "default").items():
        if not key.endswith(".lora_A"):
            noise = torch.empty_like(parameter).normal_(std=strength, generator=generator)
            parameter.data.add_(noise)
    save_adapter(model, "default", folder, base_model="projects/default/models/tiny")
    return folder
