"""An adapter added to the weights of its base, in float32 and rounded once."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from luthier.lm.lora import find_adapter, remove_adapter, trained_weights
from luthier.lm.lora_layer import LoraLinear


@torch.no_grad()
def merge_adapter(model: PreTrainedModel, name: str) -> None:
    """Put an adapter's updates into the weights of a float32 model, and take the adapter out of it.

    Ranks and strengths by pattern, rsLoRA and magnitudes (DoRA) are those that each module has; weights that the
    adapter trains whole take the place of the base's, and one that is the embedding and the head stays one. Takes the
    memory of one module's weight more at a time.

    Raises:
        NotFound: the model has no adapter of that name.
    """
    assert model.dtype == torch.float32, f"weights are added up in float32, got {model.dtype}"
    adapter = find_adapter(model, name)
    whole = dict(trained_weights(model, name))
    for module in adapter.modules:
        layer = model.get_submodule(module)
        assert isinstance(layer, LoraLinear)
        layer.weight.copy_(layer.merged_weight(name))
    remove_adapter(model, name)
    for module, weight in whole.items():
        base: Any = model.get_submodule(module).weight
        base.copy_(weight)


@torch.no_grad()
def round_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Round every weight of a float32 model to what another type holds; they stay float32, with the same values."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))


def plain_state(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return a model's weights by name, in a type and without adapters; one that has two names under its first."""
    return {
        name: parameter.detach().to(dtype).contiguous()
        for name, parameter in model.named_parameters()
        if ".lora_" not in name
    }
