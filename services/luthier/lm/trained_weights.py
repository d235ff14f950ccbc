"""Weights of embedding and head that an adapter trains whole, in place of the base's (PEFT's `modules_to_save`).

The parameter of the module itself is exchanged. So whatever reads it (the head in a fused loss, an embedding that
scales) computes with the weight of the active adapter and knows of none.

Shape suffixes: V words, E hidden size.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from luthier.errors import InvalidArgument, Reason
from luthier.lm.head import output_head

TRAINABLE = ("embed_tokens", "lm_head")
"""Modules that may be trained whole, as all our architectures call them: the embedding, and the head over words."""


class ExchangedWeights:
    """Modules whose weight is the base's or one adapter's; one object for all adapters of a model."""

    __slots__ = ("_bases", "_of_adapters")

    def __init__(self) -> None:
        self._bases: dict[str, tuple[nn.Module, nn.Parameter]] = {}
        self._of_adapters: dict[str, dict[str, nn.Parameter]] = {}

    def add(self, model: PreTrainedModel, adapter: str, weights: Mapping[str, nn.Parameter]) -> None:
        """Take in an adapter's weights by the full name of their module; the model has the base's now."""
        for name in weights:
            module = model.get_submodule(name)
            weight = module.weight
            assert isinstance(weight, nn.Parameter)
            self._bases.setdefault(name, (module, weight))
        self._of_adapters[adapter] = dict(weights)

    def remove(self, adapter: str) -> None:
        """Forget an adapter's weights, which are not in the model now."""
        del self._of_adapters[adapter]

    def of(self, adapter: str) -> Mapping[str, nn.Parameter]:
        """Return an adapter's weights by the full name of their module; modules with one weight share the parameter."""
        return self._of_adapters[adapter]

    def put(self, adapter: str | None) -> None:
        """Let each module compute with the weight that an adapter has for it, else with the base's."""
        chosen = {} if adapter is None else self._of_adapters.get(adapter, {})
        for name, (module, weight) in self._bases.items():
            module.weight = chosen.get(name, weight)


def trainable_modules(model: PreTrainedModel) -> dict[str, str]:
    """Return the full names of the modules of `TRAINABLE` that a model has."""
    wanted = dict(zip(TRAINABLE, (model.get_input_embeddings(), output_head(model)), strict=True))
    return {
        short: name
        for short, module in wanted.items()
        for name, found in model.named_modules()
        if found is module and name.rpartition(".")[2] == short
    }


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the embedding and the head are one weight; no adapter is active."""
    head = output_head(model)
    return head is not None and head.weight is model.get_input_embeddings().weight


def fresh_weights(model: PreTrainedModel, names: Sequence[str]) -> dict[str, nn.Parameter]:
    """Return copies [V, E] of the weights of some modules of `TRAINABLE`, by the modules' full names; none is active.

    Where the embedding and the head are one weight they stay one, whichever of the two is named besides the embedding.

    Raises:
        InvalidArgument: the model has no such module, or the head alone is named and is the embedding
            (TRAINED_MODULE_INVALID).
    """
    found = trainable_modules(model)
    for name in names:
        if name not in found:
            raise _invalid(name, f"must be one of {sorted(found)}, got {name!r}")
        if getattr(model.get_submodule(found[name]), "bias", None) is not None:
            raise _invalid(name, f"must name modules without a bias, {found[name]} has one")
    if "embed_tokens" in names and is_tied(model):
        shared = _copied(model, found["embed_tokens"])
        return {found["embed_tokens"]: shared, found["lm_head"]: shared}
    if "lm_head" in names and is_tied(model):
        raise _invalid(
            "lm_head",
            "must name embed_tokens: it and the head are one weight in this model, which is trained for both uses",
        )
    return {found[name]: _copied(model, found[name]) for name in sorted(names)}


def distinct(weights: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Return each parameter once, under the first name that it has, with the ending `.weight`."""
    found: dict[str, nn.Parameter] = {}
    for module, weight in weights.items():
        if not any(weight is other for other in found.values()):
            found[f"{module}.weight"] = weight
    return found


def given_weights(
    model: PreTrainedModel, tensors: Mapping[str, Tensor], *, keeps_tied: bool
) -> dict[str, nn.Parameter]:
    """Return parameters of given weights [V, E], by the full names of their modules, in the model's type.

    With `keeps_tied` the embedding and the head stay one weight where they are one in the model; no adapter is active.

    Raises:
        InvalidArgument: a weight has another shape than the module's, or one that stays tied comes with two values
            (reason MODEL_INVALID).
    """
    found: dict[str, nn.Parameter] = {}
    for name, tensor in tensors.items():
        weight: Any = model.get_submodule(name).weight
        if tensor.shape != weight.shape:
            raise InvalidArgument(
                f"{name}.weight must have shape {tuple(weight.shape)}, got {tuple(tensor.shape)}",
                reason=Reason.MODEL_INVALID,
            )
        found[name] = nn.Parameter(tensor.to(device=weight.device, dtype=weight.dtype, copy=True))
    names = trainable_modules(model)
    if not (keeps_tied and is_tied(model) and found):
        return found
    embedding, head = (names[short] for short in TRAINABLE)
    if found.keys() != {embedding, head} or not tensors[embedding].equal(tensors[head]):
        raise InvalidArgument(
            f"an adapter that ensures tied weights must have the same weight of {embedding} and {head}, it has "
            f"{'two' if len(found) == 2 else sorted(found)}",
            reason=Reason.MODEL_INVALID,
        )
    return {embedding: found[embedding], head: found[embedding]}


def _copied(model: PreTrainedModel, name: str) -> nn.Parameter:
    weight: Any = model.get_submodule(name).weight
    return nn.Parameter(weight.detach().clone())


def _invalid(name: str, words: str) -> InvalidArgument:
    return InvalidArgument(
        f"trained_modules {words}", reason=Reason.TRAINED_MODULE_INVALID, metadata={"module": name}
    )
