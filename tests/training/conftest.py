"""A tiny random model and rows for it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from luthier.lm.attention import IMPLEMENTATION

VOCABULARY = 97


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRow:
    """One row of a rendering: tokens, and which of them are learnt."""

    row: int
    split: str
    input_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]


@pytest.fixture
def tiny_llama() -> Callable[..., PreTrainedModel]:
    """Makes a two-layer model; equal arguments give equal weights."""

    def make(dtype: torch.dtype = torch.float32, attention: str = IMPLEMENTATION) -> PreTrainedModel:
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            initializer_range=0.1,
        )
        config._attn_implementation = attention
        with torch.random.fork_rng():
            torch.manual_seed(7)
            model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        return model

    return make


@pytest.fixture
def token_rows() -> Callable[..., list[TokenRow]]:
    """Makes rows that can be learnt: 3 to 12 tokens of noise, then as many of a fixed song, supervised."""

    def make(count: int, *, seed: int = 0, validation_every: int = 5) -> list[TokenRow]:
        draw = random.Random(seed)
        rows = []
        for row in range(count):
            noise = tuple(draw.randrange(3, 20) for _ in range(draw.randint(3, 12)))
            split = "VALIDATION" if row % validation_every == validation_every - 1 else "TRAIN"
            song = tuple(30 + place % 3 for place in range(len(noise)))
            mask = (False,) * len(noise) + (True,) * len(song)
            rows.append(TokenRow(row=row, split=split, input_ids=noise + song, loss_mask=mask))
        return rows

    return make
