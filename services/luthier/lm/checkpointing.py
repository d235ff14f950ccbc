"""Activation checkpointing (arXiv:1604.06174): what a layer keeps for its gradient, and what it computes again for it.

Whatever is kept, the gradient has the very same bits: what is computed again is computed by the same kernels on the
same numbers, dropout included, which draws by row, token and layer.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from luthier.lm.kept import Checkpointing

_KEPT = frozenset(
    {
        "luthier::linear",
        "luthier::lora_linear",
        "luthier::attention_varlen",
        "aten::mm",
        "aten::addmm",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "torch_attn::_varlen_attn",
        "flash_attn::_flash_attn_varlen_forward",
    }
)
"""Operators of which what they gave is kept by SELECTIVE: they take nearly all of a layer's time."""


def checkpoint_layers(model: PreTrainedModel, kept: Checkpointing) -> None:
    """Let every layer of a model keep so much from now on, wherever gradients are asked for; in place of what it kept.

    Whatever a pass computes with (the active adapter, its dropout) must stay as it is until its gradient is there.
    """
    for layer in checkpointed_layers(model):
        module: Any = layer
        module.__dict__.pop("forward", None)
        if kept != "NONE":
            # The method and not the module is replaced: names of parameters, and hooks around the call, stay.
            module.forward = partial(_forward, module.forward, _CONTEXTS[kept])


def checkpointed_layers(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """Return the layers that are computed again as a whole, in order."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _forward(
    forward: Callable[..., Any], contexts: dict[str, Callable[[], Any]], *inputs: Any, **options: Any
) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **options)
    # No state of a generator is kept: nothing here draws from one.
    settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False, **contexts}
    return checkpoint(forward, *inputs, **settings, **options)


def _policy(_context: Any, op: Any, *_inputs: Any, **_options: Any) -> CheckpointPolicy:
    is_kept = isinstance(op, OpOverload) and op.name() in _KEPT  # type: ignore[no-untyped-call]
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


_CONTEXTS: dict[Checkpointing, dict[str, Callable[[], Any]]] = {
    "SELECTIVE": {"context_fn": partial(create_selective_checkpoint_contexts, _policy)},
    "FULL": {},
}
