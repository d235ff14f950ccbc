"""What a run's bits depend on beside its settings: demanded of torch, and promised where it can be."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils.deterministic
from transformers import PreTrainedModel

from luthier.kernels.attention_varlen import implementation

_ORDERED_ATTENTION = frozenset({"flash-attn", "torch varlen", "eager"})
"""Backends on CUDA whose backward pass adds in one order where torch is asked for determinism."""


def demand_determinism(device: torch.device) -> None:
    """Have torch compute the same bits in every run on a GPU, and raise where it cannot; on processors it does anyhow.

    For the whole process. cuBLAS needs CUBLAS_WORKSPACE_CONFIG for it, set before the GPU is opened.
    """
    if device.type == "cpu":
        return
    torch.use_deterministic_algorithms(mode=True)
    # That fills memory which is about to be written, as a help to find reads of what was not.
    filling: Any = torch.utils.deterministic
    filling.fill_uninitialized_memory = False


def attention_of(model: PreTrainedModel) -> str:
    """Return what the model's packed batches take for attention on its device."""
    config: Any = model.config
    # What the model computes in: of one that is divided among ranks the weights are wider than that.
    dtype = config.dtype or model.dtype
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    softcap = getattr(config, "attn_logit_softcapping", None) or 0.0
    return implementation(model.device, dtype, head_dim, softcap=softcap)


def best_effort_reason(model: PreTrainedModel, num_ranks: int = 1) -> str:
    """Return why a model's device may give other bits in another run; empty where it gives the same."""
    if model.device.type == "cpu":
        return ""
    if num_ranks > 1:
        return "whether the sums over several GPUs have the same bits in every run was never measured"
    if torch.version.hip is not None:
        return "whether ROCm's kernels give the same bits in every run was never measured"
    if not torch.are_deterministic_algorithms_enabled():
        return "torch was not asked for deterministic algorithms"
    attention = attention_of(model)
    if attention not in _ORDERED_ATTENTION:
        return f"the backward pass of attention by {attention} is not known to add in one order"
    return ""
