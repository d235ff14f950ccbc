"""A model as a file for other programs, read again and compared with the model before anybody has it."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from luthier.errors import InvalidArgument, LuthierError, Reason
from luthier.lm.apart import Apart, facts, here
from luthier.lm.comparing import behaviour, compared, comparison_rows
from luthier.lm.gguf_files import require_writable, write_gguf
from luthier.lm.gguf_header import metadata_alone, metadata_bytes
from luthier.lm.gguf_tokenizer import GgufTokenizer, gguf_tokenizer
from luthier.lm.held_out import plain_logprobs
from luthier.lm.load import eos_token_ids, load_gguf, load_model
from luthier.lm.made import Check, GgufType, HeldOut, Made
from luthier.lm.merge import plain_state
from luthier.lm.merging import Merged, beside_warnings, merge_into, require_close
from luthier.lm.model_config import read_config
from luthier.lm.precision import Precision
from luthier.lm.read_tokenizer import (
    ExportedTokenizer,
    OtherTokens,
    Rows,
    exported_tokenizer,
    other_tokens,
)

_LOST = frozenset({Reason.CRASHED, Reason.OUT_OF_MEMORY})
"""Why a process that reads a tokenizer has no result, whatever the tokenizer is."""

BOUNDS: dict[GgufType, float] = {"F16": 0.01, "Q8_0": 0.1}
"""Most that a form may make of the difference: see docs/models.md for what was measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportSource:
    """What to write.

    Attributes:
        model: folder of the model with all its weights.
        adapter: folder of an adapter to add to them; None: none. A chat template in it takes the place of the model's.
        form: of the file.
        title: name that the file gives its model.
        held_out: tokens that what the file holds is to score.
        precision: what the model was held in while the adapter was trained.
        stop_token_ids: tokens that end an answer as it was taught, besides those that the model's files name.
    """

    model: Path
    adapter: Path | None
    form: GgufType
    title: str
    held_out: HeldOut = ()
    precision: Precision = "BFLOAT16"
    stop_token_ids: tuple[int, ...] = ()


def export_files(
    source: ExportSource, directory: Path, check: Callable[[], None] = lambda: None, apart: Apart = here
) -> Made:
    """Write a model as one GGUF file into `directory` (made if missing), and compare what it holds with the model.

    An adapter is added in float32, and the sum rounded to the form of the file alone. Takes 8 bytes a weight. `check`
    is called between its parts; what it raises ends it. `apart` runs what reads tokenizers; what it raises ends it too.

    Raises:
        InvalidArgument: EXPORT_NOT_POSSIBLE, or MODEL_INVALID; the files cannot be used.
        FailedPrecondition: WEIGHTS_DIFFER; what the file holds computes something else.
    """
    config = read_config(source.model)
    require_writable(config)
    # It refuses before weights are read, and is forked while there is little to fork.
    own = facts(apart, ExportedTokenizer, lambda: exported_tokenizer(source.model, source.adapter))
    model = load_model(source.model, dtype=torch.float32)
    rows = comparison_rows(own.rows, model.config.vocab_size)
    check()
    merged = _reference(model, source, rows, check)
    ends = (*source.stop_token_ids, *sorted(eos_token_ids(model)))
    tokenizer = gguf_tokenizer(own.stored, model.config.vocab_size, ends)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"model-{source.form.lower()}.gguf"
    said = {**model.config.to_dict(), **config}
    warnings = write_gguf(
        path, said, plain_state(model, torch.float32), tokenizer, source.form, source.title, check
    )
    del model
    check()
    held = load_gguf(path)
    figures = Check(
        **asdict(compared(behaviour(held, rows), merged.reference)),
        bound=BOUNDS[source.form],
        effect=merged.effect,
        unrounded_difference=merged.unrounded_difference,
        base_difference=merged.base_difference,
        held_out_logprobs=plain_logprobs(held, source.held_out),
    )
    require_close(figures, f"{path.name}")
    warnings += (*_other_tokens(path, source, tokenizer, apart), *_other_ends(tokenizer))
    if source.adapter is not None:
        warnings = (*beside_warnings(source.precision, merged.base_difference), *warnings)
    return Made(files=((path.name, path),), check=figures, warnings=warnings)


def _reference(model: PreTrainedModel, source: ExportSource, rows: Rows, check: Callable[[], None]) -> Merged:
    """Return what the file has to compute, and what merging an adapter on the way did; the model has it then."""
    if source.adapter is None:
        reference = behaviour(model, rows)
        return Merged(reference=reference, effect=0.0, unrounded_difference=0.0, base_difference=0.0)
    return merge_into(model, source.adapter, rows, check, source.precision)


def _other_ends(tokenizer: GgufTokenizer) -> tuple[str, ...]:
    """Say at which tokens answers end here, and not by what the file says."""
    if not tokenizer.further_end_ids:
        return ()
    texts = ", ".join(repr(tokenizer.tokens[number]) for number in tokenizer.further_end_ids)
    return (
        f"answers end at {texts} too, for which a GGUF file has no place: it names three ends of an answer; a program "
        "that reads it must be told to stop there",
    )


def _other_tokens(
    path: Path, source: ExportSource, tokenizer: GgufTokenizer, apart: Apart
) -> tuple[str, ...]:
    """Say where the file, read by transformers, gives other tokens than the model's own tokenizer.

    The file is whole and compared by then: a reading that fails, or whose process is lost, is told in a warning. A full
    disk ends the export, and so does who wants it no more.
    """
    with metadata_alone(path, metadata_bytes(path), path.parent) as alone:
        try:
            return facts(
                apart,
                OtherTokens,
                lambda: other_tokens(alone, source.model, source.adapter, tokenizer.tokens, tokenizer.cut),
            ).warnings
        except (LuthierError, MemoryError) as error:
            # What takes more than a limit allows is an InvalidArgument, too.
            is_lost = isinstance(error, MemoryError) or error.reason in _LOST
            if not is_lost and not isinstance(error, InvalidArgument):
                raise
            why = error.message if isinstance(error, LuthierError) else str(error) or "out of memory"
            return (f"transformers cannot read the tokenizer of {path.name} ({why}); llama.cpp may",)
