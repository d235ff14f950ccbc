"""What merging and exporting read of a model's own tokenizer.

All of it runs tokenizers: it is called where `lm.apart` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from luthier.lm.gguf_tokenizer import StoredTokenizer, stored_tokenizer
from luthier.lm.probe_texts import probe_texts
from luthier.lm.tokenizer_files import open_gguf_tokenizer
from luthier.text.tokenizer import BUNDLE_FILES, TOKENIZER_FILE, TokenizerBundle

_TEXTS = (
    "The harbour lay still in the early light, and 3 of the 12 boats had not come back. Nobody spoke of it.",
    "def area(width: float, height: float) -> float:\n    return width * height  # square metres\n",
    "Question: which is heavier, a litre of oil or a litre of water?\nAnswer: Water, as it is denser: oil floats.",
)
_MAX_TEXT = 48
_SHOWN = 8

Rows = tuple[tuple[int, ...], ...]
"""Rows of tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRows:
    """The tokens of some short texts, each as it begins."""

    rows: Rows


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedTokenizer:
    """The tokens of some short texts, and what a GGUF file holds of their tokenizer."""

    rows: Rows
    stored: StoredTokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherTokens:
    """What whoever reads a file should know of the tokens that it gives."""

    warnings: tuple[str, ...]


def text_rows(model: Path) -> TextRows:
    """Return the tokens of some short texts, by the tokenizer of a model's folder."""
    return TextRows(rows=_rows(TokenizerBundle.load(model)))


def exported_tokenizer(model: Path, adapter: Path | None) -> ExportedTokenizer:
    """Return what an export takes of the tokenizer of a model's folder; an adapter's template is its template.

    Raises:
        InvalidArgument: EXPORT_NOT_POSSIBLE; GGUF has no form for it.
    """
    bundle = _bundle(model, adapter)
    stored = stored_tokenizer((model / TOKENIZER_FILE).read_bytes(), bundle)
    return ExportedTokenizer(rows=_rows(bundle), stored=stored)


def other_tokens(
    metadata: Path, model: Path, adapter: Path | None, tokens: Sequence[str], cut: str
) -> OtherTokens:
    """Say where a GGUF file of some tokens, read by transformers, gives others than the model's own tokenizer.

    llama.cpp cuts texts by the name that the file has for it; transformers does not know all of these names.

    Raises:
        InvalidArgument: MODEL_INVALID; transformers cannot read it.
    """
    bundle = _bundle(model, adapter)
    read = open_gguf_tokenizer(metadata)
    for text in probe_texts(token for token in tokens if token in bundle.special_texts):
        expected = list(bundle.encode(text).ids)
        got = read(text, add_special_tokens=False)["input_ids"]
        if got != expected:
            said = (
                f"transformers reads the tokenizer of {metadata.name} so that {text!r} gives {got[:_SHOWN]}, not "
                f"{expected[:_SHOWN]}: it does not cut texts as {cut} does; llama.cpp is told to"
            )
            return OtherTokens(warnings=(said,))
    return OtherTokens(warnings=())


def _bundle(model: Path, adapter: Path | None) -> TokenizerBundle:
    files = {name: (model / name) for name in BUNDLE_FILES}
    if adapter is not None:
        files |= {name: adapter / name for name in BUNDLE_FILES if (adapter / name).is_file()}
    return TokenizerBundle({name: path.read_bytes() for name, path in files.items() if path.is_file()})


def _rows(bundle: TokenizerBundle) -> Rows:
    rows = [(*bundle.prefix_ids, *bundle.encode(text).ids)[:_MAX_TEXT] for text in _TEXTS]
    return tuple(row for row in rows if row)
