"""What merging and exporting are told and what is made, by name. Imports no torch: who orders it needs none."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

GgufType = Literal["F16", "Q8_0"]
"""How a GGUF file holds its matrices."""

EXPORTABLE = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Architectures whose GGUF files can be written here, and read again to be compared."""

GENERATION_CONFIG = "generation_config.json"
"""Where other programs read at which tokens a model's answers end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutRow:
    """Tokens, and the places of those that are scored, from 1, in rising order."""

    token_ids: tuple[int, ...]
    positions: tuple[int, ...]


HeldOut = tuple[HeldOutRow, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """How what was made was compared with what it was made from; attributes as in `luthier.v1.WeightsCheck`."""

    num_positions: int
    difference: float
    bound: float
    effect: float = 0.0
    unrounded_difference: float = 0.0
    base_difference: float = 0.0
    num_greedy_tokens: int
    num_equal_greedy_tokens: int
    held_out_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What was made: files as (name, path) in name order, how it was compared, and what its user should know."""

    files: tuple[tuple[str, Path], ...]
    check: Check
    warnings: tuple[str, ...] = ()
