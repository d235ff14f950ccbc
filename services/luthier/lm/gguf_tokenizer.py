"""A tokenizer bundle as GGUF holds it: tokens, merges and the name of how llama.cpp cuts texts before them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gguf import TokenType
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from luthier.errors import InvalidArgument, Reason
from luthier.text.tokenizer import TokenizerBundle

# Of several names for one expression, the one under which llama.cpp has it first.
_BY_EXPRESSION = {
    GGUF_PRE_TOKENIZER_SPLITS[name]: name for name in ("tekken", "gpt-4o", "qwen2", "llama-bpe")
}
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTokenizer:
    """What GGUF holds of a tokenizer.

    Attributes:
        tokens: one for each row of the embedding.
        kinds: what each is.
        merges: of byte-level BPE, the first is made first.
        cut: llama.cpp's name of how texts are cut before merges are made.
        special_ids: ids of special tokens by role.
        end_of_turn_id: a token that ends a turn besides the end of sequence; None: there is none.
        end_of_message_id: a third one that ends an answer; None: there is none.
        further_end_ids: all others, which the file has no place for.
        adds_bos: whether a text begins with the beginning of sequence.
        adds_eos: whether a text ends with the end of sequence.
        chat_template: Jinja; empty: there is none.
    """

    tokens: Sequence[str]
    kinds: Sequence[TokenType]
    merges: Sequence[str]
    cut: str
    special_ids: Mapping[str, int]
    end_of_turn_id: int | None
    end_of_message_id: int | None
    further_end_ids: Sequence[int]
    adds_bos: bool
    adds_eos: bool
    chat_template: str

    def add_to(self, writer: Any) -> None:
        """Write it into a file's metadata."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.cut)
        writer.add_token_list(list(self.tokens))
        writer.add_token_types(list(self.kinds))
        writer.add_token_merges(list(self.merges))
        for role, number in self.special_ids.items():
            getattr(writer, f"add_{role}_id")(number)
        if self.end_of_turn_id is not None:
            writer.add_eot_token_id(self.end_of_turn_id)
        if self.end_of_message_id is not None:
            writer.add_eom_token_id(self.end_of_message_id)
        writer.add_add_bos_token(self.adds_bos)
        writer.add_add_eos_token(self.adds_eos)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTokenizer:
    """What a tokenizer bundle says of all that GGUF holds, whatever the rows of the embedding.

    Attributes:
        texts: of tokens by id.
        added: the ids of those that were added to the vocabulary, and whether each is special.
        merges: as `GgufTokenizer` has them, and so all others.
    """

    texts: Mapping[int, str]
    added: Mapping[int, bool]
    merges: Sequence[str]
    cut: str
    special_ids: Mapping[str, int]
    adds_bos: bool
    adds_eos: bool
    chat_template: str


def stored_tokenizer(content: bytes, bundle: TokenizerBundle) -> StoredTokenizer:
    """Return what GGUF takes of a `tokenizer.json` and its bundle.

    Raises:
        InvalidArgument: EXPORT_NOT_POSSIBLE; it is no byte-level BPE, or cuts or changes texts in a way that llama.cpp
            has no name for.
    """
    stored = json.loads(content)
    cut = _cut(stored)
    added = {token["id"]: token for token in stored.get("added_tokens") or ()}
    texts = {number: text for text, number in dict(stored["model"]["vocab"]).items()}
    texts |= {number: token["content"] for number, token in added.items()}
    special = {role: bundle.special_id(role) for role in _ROLES}
    return StoredTokenizer(
        texts=texts,
        added={number: bool(token.get("special")) for number, token in added.items()},
        merges=[one if isinstance(one, str) else " ".join(one) for one in stored["model"]["merges"]],
        cut=cut,
        special_ids={role: number for role, number in special.items() if number is not None},
        adds_bos=bool(bundle.prefix_ids),
        adds_eos=bool(bundle.suffix_ids),
        chat_template=bundle.chat_template or "",
    )


def gguf_tokenizer(stored: StoredTokenizer, num_rows: int, end_ids: Sequence[int] = ()) -> GgufTokenizer:
    """Return how GGUF holds a tokenizer.

    `num_rows` is how many tokens the embedding has: those that no text gives are called `[PAD...]`, as llama.cpp does.
    `end_ids` are tokens at which generation stops, those first by which turns end.
    """
    eos = stored.special_ids.get("eos_token")
    ends = [number for number in dict.fromkeys(end_ids) if number != eos and 0 <= number < num_rows]
    turn, message = [*ends, None, None][:2]
    return GgufTokenizer(
        tokens=[stored.texts.get(number, f"[PAD{number}]") for number in range(num_rows)],
        kinds=[_kind(number, stored) for number in range(num_rows)],
        merges=stored.merges,
        cut=stored.cut,
        special_ids=stored.special_ids,
        end_of_turn_id=turn,
        end_of_message_id=message,
        further_end_ids=ends[2:],
        adds_bos=stored.adds_bos,
        adds_eos=stored.adds_eos,
        chat_template=stored.chat_template,
    )


def _kind(number: int, stored: StoredTokenizer) -> TokenType:
    if number in stored.added:
        return TokenType.CONTROL if stored.added[number] else TokenType.USER_DEFINED
    return TokenType.NORMAL if number in stored.texts else TokenType.UNUSED


def _cut(stored: Mapping[str, Any]) -> str:
    """Return llama.cpp's name of how a tokenizer cuts texts."""
    model = stored.get("model") or {}
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback") or not model.get("merges"):
        raise _not_possible("a byte-level BPE", _described(model))
    normalizer = (stored.get("normalizer") or {}).get("type")
    before = stored.get("pre_tokenizer") or {}
    is_list = before.get("type") == "Sequence"
    parts: list[Any] = list(before.get("pretokenizers") or ()) if is_list else [before]
    kinds = [part.get("type") for part in parts]
    if not kinds or kinds[-1] != "ByteLevel" or parts[-1].get("add_prefix_space"):
        raise _not_possible("a byte-level BPE that puts no space before texts", str(kinds))
    name = _name(parts[:-1], uses_own=parts[-1].get("use_regex", True))
    if name is None or normalizer not in (None, "NFC" if name == "qwen2" else None):
        raise _not_possible(
            f"one that cuts texts as gpt-2, smollm, {', '.join(sorted(_BY_EXPRESSION.values()))} do",
            f"{[normalizer] if normalizer else []} and {kinds} with other settings",
        )
    return name


def _name(parts: Sequence[Mapping[str, Any]], *, uses_own: bool) -> str | None:
    """Return the name of what stands before the bytes: GPT-2's own expression, one with digits apart, or another."""
    kinds = [part.get("type") for part in parts]
    if uses_own:
        digits = kinds == ["Digits"] and parts[0].get("individual_digits")
        return "smollm" if digits else None if kinds else "gpt-2"
    if kinds != ["Split"] or parts[0].get("behavior") != "Isolated" or parts[0].get("invert"):
        return None
    return _BY_EXPRESSION.get(str((parts[0].get("pattern") or {}).get("Regex")))


def _described(model: Mapping[str, Any]) -> str:
    if model.get("type", "BPE") == "BPE" and model.get("byte_fallback"):
        return "a BPE of pieces, with bytes only where these have no word (sentencepiece)"
    return f"{model.get('type')}" if model.get("merges") else f"{model.get('type')} without merges"


def _not_possible(right: str, value: str) -> InvalidArgument:
    return InvalidArgument(
        f"for a GGUF file the tokenizer must be {right}, got {value}", reason=Reason.EXPORT_NOT_POSSIBLE
    )
