"""What is probed: a tokenizer that reads one kind of text otherwise than its file is refused for that kind alone."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from luthier.errors import InvalidArgument
from luthier.lm import tokenizer_files
from luthier.text.tokenizer import CONFIG_FILE, TOKENIZER_FILE, TokenizerBundle

Stored = dict[str, Any]
END = "<|end|>"
SAMPLES = {
    "words": "plain words, and a full stop.",
    "short numbers": "at 407 and 86",
    "long numbers": "at 9081726354",
    "other digits": "۰ ٧٧٢",
    "spaces before": "  before",
    "spaces behind": "behind  ",
    "spaces between": "one   two",
    "tabs": "one\ttwo",
    "empty lines": "one\n\n\ntwo",
    "line ends": "one\r\ntwo",
    "no line end": "one\rtwo",
    "nul": "one\x00two",
    "bell": "one\x07two",
    "escape": "one\x1btwo",
    "delete": "one\x7ftwo",
    "hard spaces": "one\u00a0two",
    "wide spaces": "one\u3000two",
    "joiners": "one\u200dtwo",
    "zero width": "one\u200btwo",
    "byte order marks": "one\ufefftwo",
    "control tokens": END,
    "control tokens within": f"one{END}two",
    "spaces before control tokens": f"one {END}",
    "spaces behind control tokens": f"{END} one",
    "capitals": "ONE Two",
    "composed": "\u00f6\u00e8",
    "decomposed": "o\u0308e\u0300",
    "compatibility": "\ufb02 \u2461",
    "emoji": "\U0001f44d\U0001f469",
    "Arabic": "سلام",
    "Armenian": "բարեւ",
    "Bengali": "নম",
    "Cherokee": "ᎣᏏᏲ",
    "Cyrillic": "привет",
    "Devanagari": "नम",
    "Ethiopic": "ሰላም",
    "Georgian": "გამარჯობა",
    "Gothic": "\U00010337\U00010330",
    "Greek": "γεια",
    "Han": "你好",
    "Hangul": "안녕",
    "Hebrew": "שלום",
    "Hiragana": "こん",
    "Katakana": "コン",
    "Khmer": "សួ",
    "Lao": "ສະ",
    "Tamil": "வண",
    "Thai": "สวัสดี",
}
"""A text of each kind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A way to read otherwise what is of some kinds.

    Attributes:
        kinds: those of the samples.
        apply: changes a stored tokenizer.
    """

    kinds: frozenset[str]
    apply: Callable[[Stored], None]


def normalized(normalizer: Any, *kinds: str) -> Change:
    """Texts are changed before they are cut."""
    wrapped = Tokenizer(models.BPE())
    wrapped.normalizer = normalizer
    made = json.loads(wrapped.to_str())["normalizer"]

    def apply(stored: Stored) -> None:
        stored["normalizer"] = made

    return Change(kinds=frozenset(kinds), apply=apply)


def replaced(expression: str, by: str, *kinds: str) -> Change:
    return normalized(normalizers.Replace(Regex(expression), by), *kinds)


def cut(expression: str, *kinds: str) -> Change:
    """What an expression finds is a piece of its own, before texts are cut by the file."""
    first = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}

    def apply(stored: Stored) -> None:
        stored["pre_tokenizer"]["pretokenizers"].insert(0, first)

    return Change(kinds=frozenset(kinds), apply=apply)


def marked(flag: str, kind: str) -> Change:
    """The control token is recognised otherwise."""

    def apply(stored: Stored) -> None:
        (token,) = (one for one in stored["added_tokens"] if one["content"] == END)
        token[flag] = True

    return Change(kinds=frozenset([kind]), apply=apply)


SCRIPTS = [
    "Armenian",
    "Bengali",
    "Cherokee",
    "Cyrillic",
    "Devanagari",
    "Ethiopic",
    "Georgian",
    "Gothic",
    "Greek",
    "Han",
    "Hangul",
    "Hebrew",
    "Hiragana",
    "Katakana",
    "Khmer",
    "Lao",
    "Tamil",
    "Thai",
]
CHANGES = {
    "digits are cut one by one": cut(r"[0-9]", "short numbers", "long numbers"),
    "digits are cut by three from the right": cut(r"[0-9]{1,3}(?=([0-9]{3})*(?![0-9]))", "long numbers"),
    "other digits": replaced(r"[\u0660-\u0669\u06f0-\u06f9]", "?", "other digits"),
    "spaces before": replaced(r"\A +", "", "spaces before", "spaces behind control tokens"),
    "spaces behind": replaced(r" +\z", "", "spaces behind", "spaces before control tokens"),
    "spaces between": replaced(r"(?<=\S) {2,}(?=\S)", " ", "spaces between"),
    "tabs": replaced(r"\t", " ", "tabs"),
    "empty lines": replaced(r"\n{2,}", "\n", "empty lines"),
    "line ends": replaced(r"\r\n", "\n", "line ends"),
    "no line end": replaced(r"\r(?!\n)", "\n", "no line end"),
    "nul": replaced(r"\x00", "", "nul"),
    "bell": replaced(r"\x07", "", "bell"),
    "escape": replaced(r"\x1b", "", "escape"),
    "delete": replaced(r"\x7f", "", "delete"),
    "hard spaces": replaced(r"\u00a0", " ", "hard spaces"),
    "wide spaces": replaced(r"\u3000", " ", "wide spaces"),
    "joiners": replaced(r"\u200d", "", "joiners"),
    "zero width": replaced(r"\u200b", "", "zero width"),
    "byte order marks": replaced(r"\ufeff", "", "byte order marks"),
    "control tokens only alone": marked("single_word", "control tokens within"),
    "control tokens take spaces before": marked("lstrip", "spaces before control tokens"),
    "control tokens take spaces behind": marked("rstrip", "spaces behind control tokens"),
    "capitals": normalized(normalizers.Lowercase(), "capitals", "Cherokee"),
    "composed": normalized(normalizers.NFD(), "composed", "Hangul"),
    "decomposed": normalized(normalizers.NFC(), "decomposed"),
    "compatibility": normalized(
        normalizers.NFKC(), "compatibility", "decomposed", "wide spaces", "hard spaces"
    ),
    "emoji": replaced("[\U0001f300-\U0001faff]", "?", "emoji"),
    "Arabic": replaced("[\u0621-\u064a]", "?", "Arabic"),
    **{script: replaced(rf"\p{{{script}}}", "?", script) for script in SCRIPTS},
}


@pytest.fixture(scope="module")
def stored() -> Stored:
    """A byte-level tokenizer that cuts digits by three from the left."""
    core = Tokenizer(models.BPE())
    pieces = r"\p{N}{1,3}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pieces), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator([f"{number:03d} one two" for number in range(1000)] * 2, trainer)
    core.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    found: Stored = json.loads(core.to_str())
    return found


def changed_by(stored: Stored, change: Change) -> Stored:
    changed = copy.deepcopy(stored)
    change.apply(changed)
    return changed


@pytest.fixture
def source(tmp_path: Path, stored: Stored) -> Path:
    """The tokenizer's files as its authors wrote them."""
    folder = tmp_path / "source"
    write_folder(folder, stored)
    return folder


def write_folder(folder: Path, stored: Stored) -> None:
    folder.mkdir()
    (folder / TOKENIZER_FILE).write_text(json.dumps(stored))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    (folder / CONFIG_FILE).write_text(json.dumps(settings))


def refusal(source: Path, stored: Stored) -> str:
    out = source.parent / "out"
    out.mkdir()
    with pytest.raises(InvalidArgument) as caught:
        tokenizer_files.write_tokenizer(source, out, len(stored["model"]["vocab"]) + 1)
    assert caught.value.reason == "MODEL_INVALID"
    return caught.value.message


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_of_its_kinds_alone(stored: Stored, name: str) -> None:
    change = CHANGES[name]
    ours = Tokenizer.from_str(json.dumps(stored))
    theirs = Tokenizer.from_str(json.dumps(changed_by(stored, change)))
    differing = {kind for kind, text in SAMPLES.items() if ours.encode(text).ids != theirs.encode(text).ids}
    assert differing == change.kinds


@pytest.mark.parametrize("name", CHANGES)
def test_a_tokenizer_that_transformers_reads_otherwise_in_one_kind_of_text_is_refused(
    source: Path, stored: Stored, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    other = source.parent / "other"
    write_folder(other, changed_by(stored, CHANGES[name]))
    read = tokenizer_files.open_converted
    monkeypatch.setattr(tokenizer_files, "open_converted", lambda path, **options: read(other, **options))
    said = rf"the tokens must be those of {re.escape(TOKENIZER_FILE)}, transformers gives others: .+ by the file \["
    assert re.match(said, refusal(source, stored), re.DOTALL)


@pytest.mark.parametrize("name", CHANGES)
def test_a_tokenizer_that_is_kept_otherwise_in_one_kind_of_text_is_refused(
    source: Path, stored: Stored, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    kept = TokenizerBundle({TOKENIZER_FILE: json.dumps(changed_by(stored, CHANGES[name])).encode()})
    monkeypatch.setattr(tokenizer_files, "_bundle", lambda files: kept)
    said = rf"the tokens must be those of {re.escape(TOKENIZER_FILE)}: .+ gives \["
    assert re.match(said, refusal(source, stored), re.DOTALL)


def test_a_tokenizer_that_is_read_as_its_file_is_kept(source: Path, stored: Stored, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    written = tokenizer_files.write_tokenizer(source, tmp_path / "out", len(stored["model"]["vocab"]) + 1)
    assert written.warnings == ()
    assert (tmp_path / "out" / TOKENIZER_FILE).read_bytes() == (source / TOKENIZER_FILE).read_bytes()
