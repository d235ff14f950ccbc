"""What a registration knows of the tokenizer that it has written, once that is closed again. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from luthier.text.tokenizer import TokenizerBundle

_END_OF_TURN_TOKENS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<|end_of_turn|>",
    "<|endofturn|>",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenTokenizer:
    """A bundle that was written.

    Attributes:
        has_chat_template: whether the bundle has one.
        end_of_turn_token_ids: the tokens by whose names turns end and which the template writes, in rising order.
        eos_token_id: of the token that the configuration calls the end of sequence; None: there is none.
        warnings: what whoever loads it should know.
    """

    has_chat_template: bool
    end_of_turn_token_ids: tuple[int, ...]
    eos_token_id: int | None
    warnings: tuple[str, ...]


def written_tokenizer(bundle: TokenizerBundle, warnings: tuple[str, ...]) -> WrittenTokenizer:
    """Return what is known of a bundle."""
    text = bundle.chat_template or ""
    endings = {bundle.token_id(token) for token in _END_OF_TURN_TOKENS if token in text}
    return WrittenTokenizer(
        has_chat_template=bool(text),
        end_of_turn_token_ids=tuple(sorted(token for token in endings if token is not None)),
        eos_token_id=bundle.special_id("eos_token"),
        warnings=warnings,
    )
