"""What reads tokenizers is handed elsewhere: the same comes of it, and none is made where models are."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tests.lm.made_models import adapter_folder, bpe, model_folder
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from luthier.errors import Cancelled, InvalidArgument, Reason, ResourceExhausted, Unavailable
from luthier.lm import tokenizer_files
from luthier.lm.apart import Apart, facts, here
from luthier.lm.exporting import ExportSource, export_files
from luthier.lm.lora import LoraSpec
from luthier.lm.made import Made
from luthier.lm.merging import merge_files
from luthier.lm.read_tokenizer import ExportedTokenizer, TextRows, exported_tokenizer
from luthier.lm.register import register_source
from luthier.lm.sources import DirectorySource, GgufSource
from luthier.text import tokenizer
from luthier.work.limited_child import Limits
from luthier.work.limited_fork import in_fork

ModelMaker = Callable[..., Any]


class MadeHere(BaseException):
    """A tokenizer was to be made in the wrong process; whoever takes any failure for the file's must not."""


class Elsewhere:
    """Something of a library that must not be used in the process in which it was wrapped."""

    def __init__(self, wrapped: Any) -> None:
        self.wrapped = wrapped
        self.pid = os.getpid()

    def __getattr__(self, name: str) -> Any:
        if os.getpid() == self.pid:
            raise MadeHere(f"{name} of {self.wrapped}")
        return getattr(self.wrapped, name)


def forbid_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have whatever makes a tokenizer fail in this process, transformers by itself too."""
    monkeypatch.setattr(tokenizer, "tokenizers", Elsewhere(tokenizers))
    monkeypatch.setattr(tokenizer_files, "tokenizers", Elsewhere(tokenizers))
    monkeypatch.setattr(tokenizer_files, "AutoTokenizer", Elsewhere(AutoTokenizer))
    begin: Any = PreTrainedTokenizerBase.__init__
    pid = os.getpid()

    def made(*arguments: Any, **named: Any) -> None:
        if os.getpid() == pid:
            raise MadeHere("by transformers")
        begin(*arguments, **named)

    monkeypatch.setattr(PreTrainedTokenizerBase, "__init__", made)


def all_made(base: Path, adapter: Path, folder: Path, apart: Apart) -> tuple[list[Any], dict[str, bytes]]:
    """Register a folder, merge, export, and register what was exported: what is said of each, and all files."""
    source = ExportSource(model=base, adapter=adapter, form="Q8_0", title="tiny", stop_token_ids=(5, 7, 8, 9))
    plain = DirectorySource(path=base)
    said: list[Any] = [register_source(plain, folder / "plain", scratch=folder / "scratch", apart=apart)]
    said.append(merge_files(base, adapter, folder / "merged", apart=apart))
    said.append(export_files(source, folder / "exported", apart=apart))
    ((_, exported),) = said[-1].files
    gguf = GgufSource(path=exported)
    said.append(register_source(gguf, folder / "again", scratch=folder / "scratch", apart=apart))
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return [repr(one).replace(str(folder), "") for one in said], files


def test_whatever_is_made_of_a_model_makes_no_tokenizer_here_and_is_the_same(
    tiny_model: ModelMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = model_folder(tiny_model(vocab_size=270), tmp_path / "base")
    adapter = adapter_folder(base, tmp_path / "adapter", LoraSpec(rank=4, alpha=8))
    made_here = all_made(base, adapter, tmp_path / "here", here)
    forbid_here(monkeypatch)
    made_apart = all_made(base, adapter, tmp_path / "apart", partial(in_fork, limits=Limits()))
    assert made_apart == made_here
    assert {"plain/tokenizer.json", "again/tokenizer.json", "exported/model-q8_0.gguf"} <= made_apart[
        1
    ].keys()
    assert "scratch" not in {Path(name).parts[0] for name in made_apart[1]}, "what it is read from is gone"
    with pytest.raises(MadeHere):
        all_made(base, adapter, tmp_path / "again", here)


def test_facts_are_of_the_kinds_that_they_are_to_have() -> None:
    rows = ((1, 2), (), (3,))
    assert facts(here, TextRows, lambda: TextRows(rows=rows)).rows == rows
    with pytest.raises(InvalidArgument, match="tokenizer fails: Expected `int`, got `str`") as caught:
        facts(lambda _: {"rows": [["1"]]}, TextRows, lambda: TextRows(rows=()))
    assert caught.value.reason == Reason.MODEL_INVALID


@pytest.mark.parametrize("template", [{"a": 1}, 3])
@pytest.mark.parametrize("apart", [here, partial(in_fork, limits=Limits())])
def test_a_tokenizer_whose_files_hold_other_kinds_of_values_is_refused(
    tmp_path: Path, apart: Apart, template: Any
) -> None:
    bpe().save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    with pytest.raises(InvalidArgument, match="the model's tokenizer fails: ") as caught:
        facts(apart, ExportedTokenizer, lambda: exported_tokenizer(tmp_path, None))
    assert caught.value.reason == Reason.MODEL_INVALID


def exported(base: Path, out: Path, second: Exception, *, first: Exception | None = None) -> Made:
    """Export; what reads the tokenizer back fails, or what reads the model's own."""
    failures = [first, second]

    def apart(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if failure := failures.pop(0):
            raise failure
        return work()

    source = ExportSource(model=base, adapter=None, form="F16", title="tiny")
    return export_files(source, out, apart=apart)


TOO_MUCH = InvalidArgument("it takes too much", reason=Reason.MODEL_INVALID)


@pytest.mark.parametrize(
    "failure",
    [
        TOO_MUCH,
        MemoryError("it takes too much"),
        Unavailable("it takes too much", reason=Reason.CRASHED),
        ResourceExhausted("it takes too much", reason=Reason.OUT_OF_MEMORY),
    ],
    ids=["refused", "no memory for a process", "lost", "ended by the kernel"],
)
def test_a_tokenizer_that_cannot_be_read_back_is_a_warning(
    tiny_model: ModelMaker, tmp_path: Path, failure: Exception
) -> None:
    """The file is whole, and what reads it may be another program; the first reading refuses."""
    base = model_folder(tiny_model(vocab_size=270), tmp_path / "base")
    made = exported(base, tmp_path / "out", failure)
    assert made.files[0][1].is_file()
    assert made.warnings == (
        "transformers cannot read the tokenizer of model-f16.gguf (it takes too much); llama.cpp may",
    )
    with pytest.raises(type(failure)):
        exported(base, tmp_path / "again", failure, first=failure)


@pytest.mark.parametrize(
    "failure",
    [
        ResourceExhausted("the disk is full", reason=Reason.DISK_FULL),
        Unavailable("the worker stops", reason=Reason.SHUTTING_DOWN),
        Cancelled("stopped"),
    ],
    ids=["full", "stopping", "cancelled"],
)
def test_what_ends_an_export_ends_it_while_its_tokenizer_is_read_back(
    tiny_model: ModelMaker, tmp_path: Path, failure: Exception
) -> None:
    base = model_folder(tiny_model(vocab_size=270), tmp_path / "base")
    with pytest.raises(type(failure)) as caught:
        exported(base, tmp_path / "out", failure)
    assert caught.value is failure
