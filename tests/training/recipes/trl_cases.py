"""One batch, one model and one adapter, on which our objectives and TRL's trainers are compared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from luthier.lm.attention import IMPLEMENTATION
from luthier.training.recipes.objectives import Dpo, Ipo, Kto, Orpo, PairwiseReward, Simpo

NUMBERS = Path(__file__).with_name("trl_numbers.json")
RANK, ALPHA = 4, 8

Method = Dpo | Ipo | Orpo | Simpo | Kto | PairwiseReward
CASES: dict[str, Method] = {
    "dpo_sigmoid": Dpo(beta=0.1),
    "dpo_robust": Dpo(beta=0.3, label_smoothing=0.2),
    "dpo_with_nll": Dpo(beta=0.1, nll_weight=0.7),
    "dpo_robust_with_nll": Dpo(beta=0.3, label_smoothing=0.2, nll_weight=0.5),
    "ipo": Ipo(beta=0.4),
    "ipo_with_nll": Ipo(beta=0.4, nll_weight=0.7),
    "orpo": Orpo(beta=0.3),
    "simpo": Simpo(beta=2.0, gamma=0.6),
    "kto": Kto(beta=0.2, desirable_weight=1.0, undesirable_weight=1.4),
    "kto_desirable": Kto(beta=0.2, desirable_weight=1.3, undesirable_weight=0.8),
    "reward_model": PairwiseReward(margin=0.0, centring=0.01),
    "reward_model_with_margin": PairwiseReward(margin=0.6, centring=0.01),
}

Pair = tuple[list[int], list[int], list[int]]
"""Prompt, chosen and rejected answer."""
PAIRS: list[Pair] = [
    ([5, 9, 11], [30, 31, 32], [44, 51]),
    ([8, 7, 12, 19, 4], [33, 30], [60, 61, 62, 63, 64]),
    ([14, 6], [31, 35, 31, 36, 37, 38], [70, 71, 72]),
    ([16, 17, 18, 3], [32], [80]),
]
SHORT_PAIRS: list[Pair] = [(prompt[:1], chosen, rejected) for prompt, chosen, rejected in PAIRS]
"""TRL's ORPO also learns prompts; of one token there is nothing to learn."""
ANSWERS: list[tuple[list[int], list[int], bool]] = [
    ([5, 9, 11], [30, 31, 32], True),
    ([8, 7, 12, 19, 4], [60, 61, 62, 63, 64], False),
    ([14, 6], [31, 35, 31, 36, 37, 38], True),
    ([16, 17, 18, 3], [80, 81], False),
    ([10, 3, 8], [33, 34], True),
]
"""Prompt, answer, and whether it is desirable; the answer to another prompt is the next one's."""


def pairs_of(name: str) -> list[Pair]:
    return SHORT_PAIRS if name == "orpo" else PAIRS


def tiny_model(attention: str = IMPLEMENTATION) -> PreTrainedModel:
    """The same weights on every machine and with every version."""
    config = LlamaConfig(
        vocab_size=97,
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
    )
    config._attn_implementation = attention
    model = LlamaForCausalLM(config)
    for name, parameter in sorted(model.named_parameters()):
        values = drawn(name, parameter.shape)
        parameter.data = 1 + 0.1 * values if parameter.dim() == 1 else 0.15 * values
    model.train(mode=False)
    model.requires_grad_(requires_grad=False)
    return model


def drawn(name: str, shape: torch.Size) -> Tensor:
    """Normal values that depend on a name alone."""
    state = np.random.RandomState(sum(ord(letter) * place for place, letter in enumerate(name, 1)) % 2**32)
    return torch.from_numpy(state.standard_normal(tuple(shape)).astype(np.float32))


def adapter_values(names: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Values of an adapter's factors and a head, under our names."""
    return {
        name: (0.3 if name == "score.weight" else 0.1) * drawn(name, shape) for name, shape in names.items()
    }


def fingerprints(gradients: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """The norm of each gradient and its product with a direction that depends on its name alone."""
    return {
        name: [
            gradient.norm().item(),
            (gradient * drawn(f"direction of {name}", gradient.shape)).sum().item(),
        ]
        for name, gradient in sorted(gradients.items())
    }
