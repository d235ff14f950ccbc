"""The layer that makes logits of hidden states. Shape suffixes: E hidden size, V vocabulary."""

from torch import Tensor, nn
from transformers import PreTrainedModel


def output_head(model: PreTrainedModel) -> nn.Module | None:
    """Return the layer; None: the model makes no logits."""
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return head


def head_weight(model: PreTrainedModel) -> Tensor:
    """The vocabulary matrix [V, E] that makes logits of hidden states (the embedding, if they are tied)."""
    head = output_head(model)
    assert head is not None, "a language model makes logits"
    assert isinstance(head.weight, Tensor)
    return head.weight
