"""The base models below the arms of an evaluation: which there are, and whether arms have the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from luthier.errors import FieldViolation, InvalidArgument
from luthier.v1.evaluation_pb2 import EVALUATION_METRIC_PERPLEXITY, Evaluation, EvaluationArm
from luthier.v1.model_pb2 import Model

T = TypeVar("T")


def base_name(model: Model) -> str:
    """Return the name of the model that has the weights below a model's adapter, or all of them."""
    return model.base_model or model.name


def side_by_side(found: Iterable[T], base_of: Callable[[T], str]) -> list[list[T]]:
    """Return what stands on one base model together, bases and what stands on each in the order in which they come."""
    groups: dict[str, list[T]] = {}
    for one in found:
        groups.setdefault(base_of(one), []).append(one)
    return list(groups.values())


def has_tokens_of(model: Model, other: Model, models: Mapping[str, Model]) -> bool:
    """Whether two models are known to have one tokenizer; `models` has those below them by name.

    A bundle's digest tells chat templates apart too: a model with all its weights that was taught another template than
    its base's has another digest, and still says which tokenizer it was taught with.
    """
    return bool(_tokenizers(model, models) & _tokenizers(other, models))


def arm_of_other_tokens(arms: Sequence[EvaluationArm], models: Mapping[str, Model]) -> EvaluationArm | None:
    """Return the first arm that is not known to have the first one's tokenizer; None: all have it."""
    first = models[arms[0].model]
    return next((arm for arm in arms if not has_tokens_of(models[arm.model], first, models)), None)


def require_same_tokens(evaluation: Evaluation, models: Mapping[str, Model]) -> None:
    """Raise InvalidArgument where perplexities, which are per token, are to be compared across tokenizers."""
    if EVALUATION_METRIC_PERPLEXITY not in evaluation.metrics:
        return
    other = arm_of_other_tokens(evaluation.arms, models)
    if other is not None:
        shown = "; ".join(
            f"{one.arm_id}: {base_name(models[one.model])}" for one in (evaluation.arms[0], other)
        )
        description = (
            "must not have PERPLEXITY where arms are not known to have one tokenizer, as it is per token; got "
            f"{shown}; measure BITS_PER_BYTE in its place, or perplexity in an evaluation of each"
        )
        raise InvalidArgument.of_fields(FieldViolation(field="evaluation.metrics", description=description))


def bases_of(arms: Sequence[EvaluationArm], models: Mapping[str, Model]) -> list[str]:
    """Return the base models of some arms, each once."""
    return list(dict.fromkeys(base_name(models[arm.model]) for arm in arms))


def _tokenizers(model: Model, models: Mapping[str, Model]) -> set[str]:
    """Return what is known of a model's tokenizer: a model that has it, and digests of bundles."""
    base = models[base_name(model)]
    digests = {base.tokenizer_digest, base.taught.tokenizer_digest, model.taught.tokenizer_digest}
    return {base.name, *digests} - {""}
