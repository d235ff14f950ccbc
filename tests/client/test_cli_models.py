"""Merging and exporting from the command line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from tests.client.conftest import UID
from tests.client.test_transfers import ModelStore, adapter_store

from luthier.v1.event_pb2 import Event, StateChange
from luthier.v1.model_pb2 import (
    EXPORT_FORMAT_GGUF_F16,
    EXPORT_FORMAT_GGUF_Q8_0,
    HubSource,
    Model,
    Taught,
    WeightsCheck,
)

Run = Callable[..., Result]
PARENT = "projects/default"
CHECK = WeightsCheck(
    num_positions=9,
    difference=0.012,
    bound=0.05,
    effect=0.4,
    num_greedy_tokens=64,
    num_equal_greedy_tokens=63,
)


class Models:
    """Models that are made at once, of an adapter `tuned` or whatever `kind` is."""

    def __init__(self, services: Any) -> None:
        self.asked: list[Any] = []
        self.base_model = f"{PARENT}/models/base"
        services.answers.update(
            GetModel=self.get,
            MergeModel=lambda request, context: self.make(request, "made"),
            ExportModel=lambda request, context: self.make(request, "made"),
            WatchModel=self.watch,
        )

    def get(self, request: Any, context: Any) -> Model:
        made = request.name.endswith(("/made", "/new"))
        return Model(
            name=request.name,
            uid=UID,
            state=Model.STATE_READY,
            base_model="" if made else self.base_model,
            check=CHECK if made else None,
        )

    def make(self, request: Any, name: str) -> Model:
        self.asked.append(request)
        return Model(name=f"{PARENT}/models/{request.model_id or name}", state=Model.STATE_QUEUED)

    def watch(self, request: Any, context: Any) -> Any:
        yield Event(sequence=1, state_change=StateChange(state="READY"))


@pytest.fixture
def models(services: Any) -> Models:
    ModelStore(services)
    return Models(services)


def test_merge_makes_a_model_and_says_how_it_compares(models: Models, run: Run) -> None:
    result = run("models", "merge", "job/step-20", "new")
    assert result.exit_code == 0, result.stderr
    (request,) = models.asked
    assert request.name == f"{PARENT}/fineTuningJobs/job/checkpoints/step-20"
    assert (request.model_id, bool(request.request_id)) == ("new", True)
    assert "logits differ by 0.012 of their spread (at most 0.05)" in result.stdout
    assert "what was learnt moves them by 0.4" in result.stdout
    assert "63 of 64 greedy tokens are the same" in result.stdout
    assert json.loads(run("--json", "models", "merge", "tuned").stdout)["name"] == f"{PARENT}/models/made"


@pytest.mark.parametrize(
    ("words", "form"),
    [((), EXPORT_FORMAT_GGUF_Q8_0), (("--format", "gguf-f16"), EXPORT_FORMAT_GGUF_F16)],
)
def test_export_writes_a_gguf_file_and_brings_it(
    models: Models, run: Run, tmp_path: Path, words: tuple[str, ...], form: Any
) -> None:
    result = run("models", "export", "tuned", str(tmp_path / "out"), *words)
    assert result.exit_code == 0, result.stderr
    (request,) = models.asked
    assert (request.name, request.format) == (f"{PARENT}/models/tuned", form)
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize(
    ("base_model", "form", "kinds"),
    [
        (f"{PARENT}/models/base", "safetensors", ["MergeModelRequest"]),
        ("", "safetensors", []),
        (f"{PARENT}/models/base", "peft", []),
    ],
)
def test_export_makes_no_more_than_a_form_needs(
    models: Models, run: Run, tmp_path: Path, base_model: str, form: str, kinds: list[str]
) -> None:
    models.base_model = base_model
    result = run("models", "export", "tuned", str(tmp_path / "out"), "--format", form)
    assert result.exit_code == 0, result.stderr
    assert [request.DESCRIPTOR.name for request in models.asked] == kinds
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_model_with_all_its_weights_is_no_adapter(models: Models, run: Run, tmp_path: Path) -> None:
    models.base_model = ""
    result = run("models", "export", "tuned", str(tmp_path / "out"), "--format", "peft")
    assert result.exit_code == 2
    assert "--format peft is for adapters; tuned has all its weights" in result.stderr


@pytest.mark.parametrize("base", [Model(gguf_path="/x.gguf"), Model(directory="/models/x")])
def test_an_adapter_that_peft_cannot_load_says_what_is_needed(
    services: Any, run: Run, tmp_path: Path, base: Model
) -> None:
    base.name = f"{PARENT}/models/base"
    adapter_store(services, base)
    result = run("models", "download", "tuned", str(tmp_path / "alone"))
    assert result.exit_code == 0
    assert result.stdout == f"{tmp_path / 'alone'}\n"
    assert "luthier models download base BASE" in result.stderr
    assert "luthier models download tuned DIRECTORY --base BASE" in result.stderr
    placed = run("models", "download", "tuned", str(tmp_path / "placed"), "--base", str(tmp_path / "base"))
    assert "--base BASE" not in placed.stderr


def test_an_adapter_of_a_base_from_the_hub_needs_no_word(services: Any, run: Run, tmp_path: Path) -> None:
    adapter_store(services, Model(name=f"{PARENT}/models/base", hub=HubSource(repo_id="org/base")))
    result = run("models", "download", "tuned", str(tmp_path / "out"))
    assert (result.exit_code, "--base" in result.stderr) == (0, False)


def test_models_show_says_what_a_model_was_taught_by_and_on_which_day(services: Any, run: Run) -> None:
    taught = Taught(rendering=f"{PARENT}/renderings/songs", template_date="2026-03-14")
    services.answers["GetModel"] = lambda request, context: Model(
        name=request.name, state=Model.STATE_READY, taught=taught
    )
    shown = run("models", "show", "tuned")
    assert re.search(r"^ *taught by +songs *$", shown.stdout, re.MULTILINE), shown.output
    assert re.search(r"^ *taught on +2026-03-14 *$", shown.stdout, re.MULTILINE), shown.output
