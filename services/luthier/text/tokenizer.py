"""The tokenizer bundle of a model: three files, and nothing of transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
BUNDLE_FILES = (TOKENIZER_FILE, CONFIG_FILE, TEMPLATE_FILE)
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """Token ids and, for each, the character range [start, end) of the text that it covers."""

    ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]


class TokenizerBundle:
    """A tokenizer, its special tokens and its chat template.

    Args:
        files: contents by name: tokenizer.json, tokenizer_config.json and, where there is one, chat_template.jinja.

    Attributes:
        prefix_ids: what the post-processor writes before a text, mostly the beginning-of-sequence token or nothing.
        suffix_ids: what it writes after a text, mostly nothing.

    Raises:
        ValueError: tokenizer.json is missing or no tokenizer, or tokenizer_config.json is no JSON object.
    """

    def __init__(self, files: Mapping[str, bytes]) -> None:
        if TOKENIZER_FILE not in files:
            raise ValueError(f"a tokenizer bundle must hold {TOKENIZER_FILE}, got {sorted(files)}")
        try:
            stored = json.loads(files[TOKENIZER_FILE])
            # Post-processors add special tokens, which is not asked for, and may trim spaces off the offsets:
            # a token would then seem to start behind its first character.
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps({**stored, "post_processor": None}))
            # A stored truncation or padding would change what a record becomes without a word.
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            # `add_bos_token` of the configuration is not asked: where there is a tokenizer.json, transformers 5 goes
            # by its post-processor alone.
            self.prefix_ids, self.suffix_ids = _surrounding_ids(self._tokenizer, stored.get("post_processor"))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{TOKENIZER_FILE} is no tokenizer: {error}") from error
        config = json.loads(files.get(CONFIG_FILE, b"{}"))
        if not isinstance(config, dict):
            raise ValueError(f"{CONFIG_FILE} must hold a JSON object, got {type(config).__name__}")
        self.special_tokens: Mapping[str, str] = {
            name: _token_text(config[name]) for name in _SPECIAL if config.get(name)
        }
        self.chat_template = _template(files, config)
        added = stored.get("added_tokens") or ()
        self.special_texts = tuple(token["content"] for token in added if token.get("special"))
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)

    @classmethod
    def load(cls, folder: Path) -> TokenizerBundle:
        """Read the bundle of a folder."""
        return cls({name: (folder / name).read_bytes() for name in BUNDLE_FILES if (folder / name).exists()})

    def encode(self, text: str) -> Encoding:
        """Return the tokens of a text; special tokens written in it are recognised, none are added."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return Encoding(ids=tuple(encoding.ids), offsets=tuple(encoding.offsets))

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def token_id(self, token: str) -> int | None:
        """Return the id of a token by its text, None when there is none."""
        return self._tokenizer.token_to_id(token)

    def special_id(self, name: str) -> int | None:
        """Return the id of a special token by its role, e.g. eos_token."""
        token = self.special_tokens.get(name)
        return self.token_id(token) if token else None


def _surrounding_ids(
    tokenizer: tokenizers.Tokenizer, post_processor: object
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return what a stored post-processor writes before and after a text."""
    if post_processor is None:
        return (), ()
    # The processor alone, without a second copy of the vocabulary.
    bare = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
    processor = tokenizers.Tokenizer.from_str(
        json.dumps({**bare, "post_processor": post_processor})
    ).post_processor
    for text in _short_texts(tokenizer):
        plain = tokenizer.encode(text, add_special_tokens=False)
        if plain.ids:
            whole = processor.process(plain, None, True)
            written = whole.special_tokens_mask
            first, last = written.index(0), len(written) - written[::-1].index(0)
            return tuple(whole.ids[:first]), tuple(whole.ids[last:])
    return (), ()


def _short_texts(tokenizer: tokenizers.Tokenizer) -> Iterator[str]:
    yield "a"
    yield from tokenizer.get_vocab()


def _token_text(value: Any) -> str:
    return str(value["content"]) if isinstance(value, Mapping) else str(value)


def _template(files: Mapping[str, bytes], config: Mapping[str, Any]) -> str | None:
    if TEMPLATE_FILE in files:
        return files[TEMPLATE_FILE].decode()
    template = config.get("chat_template")
    if isinstance(template, list):  # several templates by name; the default one is for plain chats
        template = next((one["template"] for one in template if one.get("name") == "default"), None)
    return template
