"""The tokenizer bundle of a model that is registered: its own tokens, kept, whoever reads the bundle.

The tokens of a model are those of its `tokenizer.json`, which is kept byte for byte. transformers 5 builds some
tokenizers anew by their class instead of reading that file, and adds tokens that a class names by default; so what
the registered folder gives is compared with the file as it came, on probe texts.

All of it runs tokenizers: it is called where `lm.apart` says.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from luthier.errors import InvalidArgument, Reason
from luthier.lm.model_config import read_object
from luthier.lm.probe_texts import probe_texts
from luthier.lm.written_tokenizer import WrittenTokenizer, written_tokenizer
from luthier.text.tokenizer import BUNDLE_FILES, CONFIG_FILE, TEMPLATE_FILE, TOKENIZER_FILE, TokenizerBundle

Settings = dict[str, Any]
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
# What a configuration may say against the file: code, another file, tokens and flags that the file has already.
_OVERRULED = (
    "auto_map",
    "tokenizer_file",
    "vocab_file",
    "name_or_path",
    "init_inputs",
    "fast_tokenizer_files",
)
_REPEATED = ("added_tokens_decoder", "split_special_tokens", "backend", *_LISTS)
_SENTENCEPIECE = "tokenizer.model"
_SHOWN_IDS = 24
_GENERIC = "PreTrainedTokenizerFast"
# transformers 5 (TokenizersBackend.convert_to_native_format, up to 5.24) lets a class that builds its tokenizer anew
# read tokenizer.json only where the configuration has this key. It allows nothing: whether code may run is an
# argument of from_pretrained.
_READ_THE_FILE = "trust_remote_code"


@contextmanager
def _panics_named() -> Iterator[None]:
    """Name what the tokenizers library does to a text that its expressions cannot stand; a panic is no Exception."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise _invalid(
            f"{TOKENIZER_FILE} must stand every text, the tokenizers library gives up on one"
        ) from error


@_panics_named()
def write_tokenizer(source: Path, directory: Path, num_rows: int) -> WrittenTokenizer:
    """Write the bundle of the folder `source` into `directory`, which holds the model's `config.json` already.

    A source without `tokenizer.json` is converted by transformers, unless it is a sentencepiece model, whose conversion
    gives other tokens. `num_rows` is how many tokens the embedding has.

    Raises:
        InvalidArgument: MODEL_INVALID; the tokenizer cannot be read, has tokens beyond the embedding, names special
            tokens that it has not, writes more around a text than can be kept, or would give other tokens.
    """
    if not (source / TOKENIZER_FILE).is_file():
        _refuse_sentencepiece(source)
        return write_converted(open_converted(source), directory, num_rows)
    content = (source / TOKENIZER_FILE).read_bytes()
    reference = _reference(content)
    settings = read_object(source / CONFIG_FILE) if (source / CONFIG_FILE).is_file() else {}
    if "added_tokens_decoder" not in settings and (source / "special_tokens_map.json").is_file():
        settings |= read_object(source / "special_tokens_map.json")
    _check_named(settings, reference)
    template, warnings = _template(source, settings)
    for name in (*_OVERRULED, "chat_template"):
        settings.pop(name, None)
    warnings += _follow_post_processor(settings, content)
    _add_defaults(settings, reference, source)
    (directory / TOKENIZER_FILE).write_bytes(content)
    if template is not None:
        (directory / TEMPLATE_FILE).write_bytes(template)
    return _agreed(directory, settings, reference, num_rows, warnings)


@_panics_named()
def write_converted(tokenizer: PreTrainedTokenizerFast, directory: Path, num_rows: int) -> WrittenTokenizer:
    """Write a tokenizer that transformers made from other files; its conversion is compared with what is read back.

    Raises:
        InvalidArgument: as `write_tokenizer`.
    """
    reference = _reference(tokenizer.backend_tokenizer.to_str().encode())
    tokenizer.save_pretrained(directory)
    return _agreed(directory, read_object(directory / CONFIG_FILE), reference, num_rows, ())


def _refuse_sentencepiece(source: Path) -> None:
    """Refuse what transformers would convert to something else: a text's own spaces at its beginning are lost."""
    if (source / _SENTENCEPIECE).is_file():
        raise _invalid(
            f"a tokenizer must come as {TOKENIZER_FILE}, got {_SENTENCEPIECE} alone, whose tokens would not be kept: "
            "what transformers makes of a sentencepiece model differs, e.g. where a text begins with a space; take a "
            f"revision of the model that has a {TOKENIZER_FILE}, or make one, check its tokens against sentencepiece's "
            "own, and put it beside the weights"
        )


def open_converted(path: Path, **options: str) -> PreTrainedTokenizerFast:
    """Let transformers make a tokenizer of the files in a folder.

    Raises:
        InvalidArgument: it cannot (reason MODEL_INVALID).
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False, **options
        )
    # A tokenizer's parser fails with whatever it stumbles over; the tokenizers library raises bare Exception.
    except Exception as error:
        raise _invalid(
            f"the tokenizer must be readable by transformers, got {type(error).__name__}"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise _invalid(f"the tokenizer must have a tokenizer.json form, {type(tokenizer).__name__} has none")
    return tokenizer


def open_gguf_tokenizer(file: Path) -> PreTrainedTokenizerFast:
    """Let transformers make a tokenizer of a GGUF file, with the tokens that the file lists and no other.

    transformers (5.24) makes a GPT-2 tokenizer of byte-level tokens, which adds its own `<|endoftext|>` where the file
    has none, as Llama 3's: no row of the embedding is left for it.

    Raises:
        InvalidArgument: as `open_converted`.
    """
    tokenizer = open_converted(file.parent, gguf_file=file.name)
    stored = json.loads(tokenizer.backend_tokenizer.to_str())
    listed = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    stored["added_tokens"] = [one for one in stored["added_tokens"] if one["content"] in listed]
    tokenizer._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(stored))
    return tokenizer


def _reference(content: bytes) -> tokenizers.Tokenizer:
    try:
        reference = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises plain Exception
        raise _invalid(
            f"{TOKENIZER_FILE} must be a tokenizer of the tokenizers library, it is none"
        ) from error
    reference.no_truncation()
    reference.no_padding()
    return reference


def _named(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the special tokens that a configuration names, with where."""
    for role in _ROLES:
        if settings.get(role) is not None:
            yield role, _text(settings[role])
    for place in _LISTS:
        listed = settings.get(place)
        tokens = (
            listed.values() if isinstance(listed, Mapping) else listed if isinstance(listed, list) else ()
        )
        for token in tokens:
            yield place, _text(token)
    decoder = settings.get("added_tokens_decoder")
    for token in decoder.values() if isinstance(decoder, Mapping) else ():
        yield "added_tokens_decoder", _text(token)


def _check_named(settings: Mapping[str, Any], reference: tokenizers.Tokenizer) -> None:
    """Refuse tokens that transformers would add to the file: with new ids, or where the file reads their text apart."""
    added = {token.content for token in reference.get_added_tokens_decoder().values()}
    vocabulary = reference.get_vocab(with_added_tokens=True)
    for place, token in _named(settings):
        if token not in vocabulary:
            raise _invalid(
                f"the special tokens that {CONFIG_FILE} names must be in {TOKENIZER_FILE}, {place} {token!r} is not"
            )
        if token not in added:
            raise _invalid(
                f"the special tokens that {CONFIG_FILE} names must be added tokens of {TOKENIZER_FILE}, "
                f"{place} {token!r} is none: a text that writes it would be cut into other tokens"
            )


def _template(source: Path, settings: Mapping[str, Any]) -> tuple[bytes | None, tuple[str, ...]]:
    """The chat template for plain chats, and what was left out; its own file goes before the configuration."""
    if (source / TEMPLATE_FILE).is_file():
        return _utf8(_unread((source / TEMPLATE_FILE).read_bytes())), ()
    stated = settings.get("chat_template")
    notes: tuple[str, ...] = ()
    if isinstance(stated, list):
        stated = {one.get("name"): one.get("template") for one in stated if isinstance(one, Mapping)}
    if isinstance(stated, Mapping):
        others = sorted(str(name) for name in stated if name != "default")
        kept = (
            "the default one is kept" if "default" in stated else "none is the default one, and none is kept"
        )
        notes = (f"of several chat templates {kept}; left out: {', '.join(others)}",) if others else ()
        stated = stated.get("default")
    return (_utf8(stated) if isinstance(stated, str) else None), notes


def _unread(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _invalid(f"{TEMPLATE_FILE} must be UTF-8, byte {error.start} is not") from error


def _utf8(text: str, what: str = "the chat template") -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _invalid(f"{what} must be Unicode text, character {error.start} is a lone surrogate") from error


def _follow_post_processor(settings: Settings, content: bytes) -> tuple[str, ...]:
    """Let the switches of the configuration say what the post-processor does, which is what counts."""
    bundle = _bundle({TOKENIZER_FILE: content})
    warnings = []
    for switch, written in (("add_bos_token", bundle.prefix_ids), ("add_eos_token", bundle.suffix_ids)):
        if switch in settings and bool(settings[switch]) != bool(written):
            warnings.append(
                f"{CONFIG_FILE} says {switch} {bool(settings[switch])}, the post-processor of {TOKENIZER_FILE} adds "
                f"{'one' if written else 'none'}: the post-processor is followed, as transformers 5 does"
            )
            settings[switch] = bool(written)
    return tuple(warnings)


def _add_defaults(settings: Settings, reference: tokenizers.Tokenizer, source: Path) -> None:
    """Write down what only the class of the tokenizer says, as far as the file has such tokens."""
    settings.setdefault("tokenizer_class", _GENERIC)
    try:
        by_class = open_converted(source)
    except InvalidArgument:  # its class cannot read it, so it says nothing either
        return
    added = {token.content for token in reference.get_added_tokens_decoder().values()}
    for role, token in by_class.special_tokens_map.items():
        if role in _ROLES and role not in settings and str(token) in added:
            settings[role] = str(token)
    settings.setdefault("model_input_names", list(by_class.model_input_names))
    settings.setdefault("padding_side", by_class.padding_side)


def _candidates(settings: Settings) -> Iterator[Settings]:
    """Yield configurations, the nearest to what came first, the surest to read the file as it is last."""
    yield settings
    plain = {name: value for name, value in settings.items() if name not in _REPEATED}
    plain["tokenizer_class"] = _GENERIC
    names = settings.get("model_input_names")
    kept = [name for name in names if name != "token_type_ids"] if isinstance(names, list) else []
    plain["model_input_names"] = kept or ["input_ids", "attention_mask"]
    yield plain
    nothing = dict.fromkeys(role for role in _ROLES if role not in plain)
    yield {**plain, **nothing, _READ_THE_FILE: True}


def _agreed(
    directory: Path,
    settings: Settings,
    reference: tokenizers.Tokenizer,
    num_rows: int,
    warnings: tuple[str, ...],
) -> WrittenTokenizer:
    """Write the first configuration under which transformers, too, gives the tokens of the file."""
    _check_rows(reference, num_rows)
    probes = probe_texts(token.content for token in reference.get_added_tokens_decoder().values())
    difference = _write_agreeing(directory, settings, reference, probes)
    bundle = _bundle({name: (directory / name).read_bytes() for name in _written(directory)})
    _check_bundle(bundle, reference, probes, num_rows)
    if difference:
        warnings += (
            f"AutoTokenizer builds this tokenizer anew by its model type and would give other tokens ({difference}); "
            f"the {CONFIG_FILE} that is kept makes transformers {transformers.__version__} read {TOKENIZER_FILE} as it "
            "is, with another version load it by PreTrainedTokenizerFast.from_pretrained",
        )
    return written_tokenizer(bundle, warnings)


def _write_agreeing(
    directory: Path, settings: Settings, reference: tokenizers.Tokenizer, probes: Sequence[str]
) -> str:
    """Return how the first configurations differ where only the last agrees, empty where an earlier one does."""
    found: list[str] = []
    for candidate in _candidates(settings):
        text = json.dumps(candidate, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        (directory / CONFIG_FILE).write_bytes(_utf8(text, CONFIG_FILE))
        difference = _difference(directory, reference, probes)
        if difference is None:
            return found[0] if _READ_THE_FILE in candidate else ""
        found.append(difference)
    raise _invalid(f"the tokens must be those of {TOKENIZER_FILE}, transformers gives others: {found[0]}")


def _difference(directory: Path, reference: tokenizers.Tokenizer, probes: Sequence[str]) -> str | None:
    """Say where transformers first differs from the file, None where it does not."""
    try:
        loaded = open_converted(directory)
    except InvalidArgument as error:
        return error.message
    theirs, ours = loaded.get_vocab(), reference.get_vocab(with_added_tokens=True)
    if theirs != ours:
        token = min(token for token in theirs.keys() | ours.keys() if theirs.get(token) != ours.get(token))
        return f"the token {token!r} has id {theirs.get(token)}, in the file {ours.get(token)}"
    for text in probes:
        for around in (False, True):
            expected = reference.encode(text, add_special_tokens=around).ids
            got = loaded(text, add_special_tokens=around)["input_ids"]
            if got != expected:
                return f"{text!r} gives {_shown(got)}, by the file {_shown(expected)}"
    return None


def _check_rows(reference: tokenizers.Tokenizer, num_rows: int) -> None:
    """Refuse tokens that the embedding has no row for; those count that no text can produce."""
    vocabulary = reference.get_vocab(with_added_tokens=True)
    beyond = sorted((number, token) for token, number in vocabulary.items() if number >= num_rows)
    if beyond:
        number, token = beyond[0]
        raise _invalid(
            f"every token must have a row of the embedding, which has {num_rows}: {len(beyond)} have none, the first "
            f"is {token!r} with id {number}"
        )


def _check_bundle(
    bundle: TokenizerBundle, reference: tokenizers.Tokenizer, probes: Sequence[str], num_rows: int
) -> None:
    """Refuse a bundle that gives other tokens than the file, or writes around texts what cannot be kept."""
    if bundle.suffix_ids not in ((), (bundle.special_id("eos_token"),)):
        raise _invalid(
            f"{TOKENIZER_FILE} must write nothing after a text but its end-of-sequence token, it writes "
            f"{_shown(bundle.suffix_ids)}"
        )
    if any(number >= num_rows for number in bundle.prefix_ids):
        raise _invalid(
            f"the post-processor must write tokens of the embedding, which has {num_rows} rows, it writes "
            f"{_shown(bundle.prefix_ids)}"
        )
    for text in probes:
        ids = bundle.encode(text).ids
        plain = tuple(reference.encode(text, add_special_tokens=False).ids)
        if ids != plain:
            raise _invalid(
                f"the tokens must be those of {TOKENIZER_FILE}: {text!r} gives {_shown(ids)}, not {_shown(plain)}"
            )
        whole = (*bundle.prefix_ids, *ids, *bundle.suffix_ids)
        stated = tuple(reference.encode(text, add_special_tokens=True).ids)
        if whole != stated:
            raise _invalid(
                f"the post-processor must write the same before and after every text: {text!r} gives {_shown(stated)}, "
                f"not {_shown(whole)}"
            )


def _written(directory: Path) -> list[str]:
    return [name for name in BUNDLE_FILES if (directory / name).is_file()]


def _bundle(files: Mapping[str, bytes]) -> TokenizerBundle:
    try:
        return TokenizerBundle(files)
    except ValueError as error:
        raise _invalid(
            f"the tokenizer's files must be a bundle, {TOKENIZER_FILE} or {CONFIG_FILE} is broken"
        ) from error


def _text(token: object) -> str:
    return str(token["content"] if isinstance(token, Mapping) and "content" in token else token)


def _shown(ids: Sequence[int]) -> str:
    return str(list(ids[:_SHOWN_IDS])).replace("]", ", ...]" if len(ids) > _SHOWN_IDS else "]")


def _invalid(message: str) -> InvalidArgument:
    return InvalidArgument(message, reason=Reason.MODEL_INVALID)
