"""A model with all its weights made from an adapter and its base, compared with the adapter before anybody has it."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from luthier.errors import FailedPrecondition, Reason
from luthier.lm.adapter_files import load_adapter
from luthier.lm.apart import Apart, facts, here
from luthier.lm.comparing import (
    Behaviour,
    behaviour,
    compared,
    comparison_rows,
    logits_of,
    relative_difference,
)
from luthier.lm.held_out import plain_logprobs
from luthier.lm.load import load_model
from luthier.lm.lora import use_adapter
from luthier.lm.made import Check, HeldOut, Made
from luthier.lm.merge import merge_adapter, plain_state, round_weights
from luthier.lm.precision import Precision
from luthier.lm.quantise import round_linears
from luthier.lm.read_tokenizer import Rows, TextRows, text_rows

MERGED_BOUND = 0.05
"""Most that rounding to bfloat16 may make of the difference: see docs/models.md for what was measured."""
UNROUNDED_BOUND = 1e-3
"""Most that sums in another order make of it in float32, with room for other machines."""
_LITTLE_LEFT = 0.5
_ADAPTER = "merged"
_WEIGHTS_NAME = "model.safetensors"


def merge_files(
    base: Path,
    adapter: Path,
    directory: Path,
    check: Callable[[], None] = lambda: None,
    held_out: HeldOut = (),
    precision: Precision = "BFLOAT16",
    apart: Apart = here,
) -> Made:
    """Write the weights of a base with an adapter added into `directory` (made if missing), bfloat16.

    Takes 4 bytes a weight, and 2 more while the file is written. `check` is called between its parts; what it raises
    ends it. Tokens of `held_out` are scored by the result. `precision` is what the base was held in while the adapter
    was trained, as `merge_into` takes it. `apart` runs what reads the base's tokenizer; what it raises ends it.

    Raises:
        InvalidArgument: MODEL_INVALID; the files of either cannot be used.
        FailedPrecondition: WEIGHTS_DIFFER; the result computes something else than the adapter.
    """
    texts = facts(apart, TextRows, lambda: text_rows(base))  # forked while there is little to fork
    model = load_model(base, dtype=torch.float32)
    rows = comparison_rows(texts.rows, model.config.vocab_size)
    check()
    merged = merge_into(model, adapter, rows, check, precision)
    round_weights(model, torch.bfloat16)
    found = compared(behaviour(model, rows), merged.reference)
    figures = Check(
        **asdict(found),
        bound=MERGED_BOUND,
        effect=merged.effect,
        unrounded_difference=merged.unrounded_difference,
        base_difference=merged.base_difference,
        held_out_logprobs=plain_logprobs(model, held_out),
    )
    require_close(figures, "the merged weights, rounded to bfloat16")
    check()
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / _WEIGHTS_NAME
    save_file(plain_state(model, torch.bfloat16), path, metadata={"format": "pt"})
    warnings = (*beside_warnings(precision, merged.base_difference), *_warnings(figures))
    return Made(files=((_WEIGHTS_NAME, path),), check=figures, warnings=warnings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """What an adapter computed before it was merged.

    Attributes:
        reference: what the model computed with the adapter on.
        effect: what the adapter does to the logits of its base, as `relative_difference` measures it.
        unrounded_difference: how far merging moved them, before any rounding.
        base_difference: how far those of the base, held as it was while the adapter was trained, are from its own.
    """

    reference: Behaviour
    effect: float
    unrounded_difference: float
    base_difference: float


def merge_into(
    model: PreTrainedModel,
    adapter: Path,
    rows: Rows,
    check: Callable[[], None],
    precision: Precision = "BFLOAT16",
) -> Merged:
    """Add an adapter to the weights of a float32 model, and see that the logits stay.

    An adapter that was trained beside a base in 8 or 4 bits made up for what they lost: it is added to the very numbers
    that they stand for, not to those that the base was registered with, beside which nobody has ever seen it.

    Raises:
        InvalidArgument: MODEL_INVALID; the adapter's files cannot be used, or do not fit the model.
        FailedPrecondition: WEIGHTS_DIFFER; the logits move by more than sums in another order make of them.
    """
    base, base_difference = _as_trained(model, precision, rows)
    check()
    load_adapter(model, adapter, _ADAPTER)
    with use_adapter(model, _ADAPTER):
        reference = behaviour(model, rows)
    check()
    merge_adapter(model, _ADAPTER)
    moved = relative_difference(logits_of(model, rows), reference.logits)
    effect = relative_difference(base, reference.logits)
    if not moved <= UNROUNDED_BOUND:
        raise _differs("the merged weights, in float32,", moved, UNROUNDED_BOUND)
    check()
    return Merged(
        reference=reference, effect=effect, unrounded_difference=moved, base_difference=base_difference
    )


def _as_trained(model: PreTrainedModel, precision: Precision, rows: Rows) -> tuple[Tensor, float]:
    """Give a model the numbers of a precision; return its logits with them, and how far these are from before."""
    own = logits_of(model, rows)
    if precision == "BFLOAT16":
        return own, 0.0
    round_linears(model, precision)
    held = logits_of(model, rows)
    return held, relative_difference(held, own)


def beside_warnings(precision: Precision, base_difference: float) -> Sequence[str]:
    """Return what whoever takes weights away should know of the base that they were made on."""
    if precision == "BFLOAT16":
        return ()
    return (
        f"the adapter was trained beside a base in {precision} and is added to the numbers that the base has there; "
        f"they move the base's own logits by {base_difference:.2g} of their spread",
    )


def require_close(figures: Check, what: str) -> None:
    """Raise FailedPrecondition WEIGHTS_DIFFER where something is too far from what it was made from."""
    if not figures.difference <= figures.bound:
        raise _differs(what, figures.difference, figures.bound)


def _differs(what: str, difference: float, bound: float) -> FailedPrecondition:
    return FailedPrecondition(
        f"the logits of {what} must differ from those of what they are made of by at most {bound:g} of their spread, "
        f"they do by {difference:.3g}",
        reason=Reason.WEIGHTS_DIFFER,
        metadata={"difference": f"{difference:.6g}", "bound": f"{bound:g}"},
    )


def _warnings(figures: Check) -> list[str]:
    if figures.difference <= _LITTLE_LEFT * figures.effect:
        return []
    return [
        f"the adapter moves the logits by {figures.effect:.2g} of their spread, rounding its sum with the base to "
        f"bfloat16 moves them by {figures.difference:.2g}: little of what was learnt is left; the "
        "adapter itself has all"
    ]
