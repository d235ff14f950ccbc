"""Registering through a real service: what is refused by name, and what a registered model says of itself."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.training.worker.conftest import PARENT, Site
from tests.training.worker.real_worker import real_worker

from luthier.errors.status import status_to_failure
from luthier.v1 import model_pb2, model_service_pb2


async def test_a_model_says_what_ends_an_answer_and_what_to_know(site: Site, model_folder: Path) -> None:
    generation = {"eos_token_id": [5, 7, 2000]}
    (model_folder / "generation_config.json").write_text(json.dumps(generation))
    async with site.worker():
        model = await site.register(model_folder)
    assert list(model.eos_token_ids) == [2, 5, 7]  # w2 is the tokenizer's own
    assert list(model.warnings) == ["end-of-sequence ids must be in 0..96, the model names [2000]"]


async def test_a_model_says_how_its_own_template_ends_a_turn(site: Site, model_folder: Path) -> None:
    """Configuration, generation settings, tokenizer and template name other tokens each."""
    tokenizer = json.loads((model_folder / "tokenizer.json").read_text())
    marks = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer["added_tokens"].append({"id": 3, "content": "w3", **marks})
    (model_folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 5}))
    (model_folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7]}))
    turns = "{% for message in messages %}{{ message.content }} w3 {% endfor %}"
    (model_folder / "chat_template.jinja").write_text(turns)
    refusing = "{% if messages | length < 9 %}{{ raise_exception('too short') }}{% endif %}" + turns
    async with site.worker():
        model = await site.register(model_folder)
        assert (list(model.eos_token_ids), list(model.warnings)) == ([2, 3, 5, 7], [])
        (model_folder / "chat_template.jinja").write_text(refusing)
        unknown = await site.register(model_folder, "unknown")
    assert list(unknown.eos_token_ids) == [2, 5, 7]
    assert "how the chat template ends a turn could not be found" in unknown.warnings[0]
    assert "the chat template fails: too short" in unknown.warnings[0]


@pytest.mark.parametrize("name", ["config.json", "tiny-folder"])
async def test_a_disk_that_does_not_answer_once_costs_an_attempt_and_not_the_model(
    site: Site, model_folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = model_folder.with_name("tiny-folder")
    os.rename(model_folder, folder)
    really, failures = os.open, [errno.ESTALE]

    def stale_once(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if failures and dir_fd is not None and Path(path).name == name:
            number = failures.pop()
            raise OSError(number, os.strerror(number), name)
        return really(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", stale_once)
    async with site.worker():
        model = await site.register(folder)
    assert failures == []
    assert model.state == model_pb2.Model.STATE_READY, model.error.message


async def test_a_folder_with_a_fifo_is_refused_and_the_worker_goes_on(site: Site, model_folder: Path) -> None:
    os.mkfifo(model_folder / "x.index.json")
    async with site.worker():
        model = await asyncio.wait_for(site.register(model_folder), 60)
        assert model.state == model_pb2.Model.STATE_FAILED
        assert "x.index.json is a FIFO" in model.error.message
        (model_folder / "x.index.json").unlink()
        assert (await site.register(model_folder, "next")).state == model_pb2.Model.STATE_READY


async def test_a_key_is_no_model_and_its_bytes_are_not_shown(site: Site, model_folder: Path) -> None:
    key = (site.home / "api-key").read_text()
    gguf = model_folder.parent / "key.gguf"
    gguf.hardlink_to(site.home / "api-key")
    (model_folder / "chat_template.jinja").hardlink_to(site.home / "api-key")
    said = []
    async with site.worker():
        for number, source in enumerate(
            (model_pb2.Model(gguf_path=str(gguf)), model_pb2.Model(directory=str(model_folder)))
        ):
            model = await site.register_from(source, f"stolen-{number}")
            assert model.state == model_pb2.Model.STATE_FAILED
            said.append(model.error.message)
    assert all("names (hard links)" in message for message in said)
    assert all(key[:4] not in message for message in said)
    async with site.worker():
        for path in ("api-key", "worker-key", "training"):
            model = await site.register_from(model_pb2.Model(gguf_path=str(site.home / path)), path)
            error = status_to_failure(model.error)
            assert (error.code, error.reason) == ("INVALID_ARGUMENT", "PATH_NOT_ALLOWED")
            assert "must lie below an allowed root" in error.message


async def test_a_source_is_read_where_the_worker_runs_below_its_own_roots(
    site: Site, model_folder: Path, tmp_path: Path
) -> None:
    """The service's home has `models`; the worker has a home and a root of its own, which the service may not see."""
    home, root = tmp_path / "workers-home", tmp_path / "large-disk"
    home.mkdir(mode=0o700)
    shutil.copy(site.home / "worker-key", home / "worker-key")
    shutil.copytree(model_folder, root / "tiny")
    with real_worker(site, "elsewhere", LUTHIER_HOME=str(home), LUTHIER_WORKER_MODEL_ROOTS=str(root)):
        model = await asyncio.wait_for(site.register(root / "tiny", "there"), 120)
        assert model.state == model_pb2.Model.STATE_READY, model.error.message
        assert model.directory == str(root / "tiny")
        refused = await asyncio.wait_for(site.register(model_folder, "here"), 60)
        error = status_to_failure(refused.error)
        assert (error.code, error.reason) == ("INVALID_ARGUMENT", "PATH_NOT_ALLOWED")
        assert f"model.directory: must lie below an allowed root ({root})" in error.message
        assert f"got '{model_folder}'; LUTHIER_WORKER_MODEL_ROOTS of the training worker" in error.message
        missing = await asyncio.wait_for(site.register(root / "none", "missing"), 60)
        error = status_to_failure(missing.error)
        assert (error.code, error.reason) == ("FAILED_PRECONDITION", "BASE_MODEL_MISSING")
        assert f"must exist on the worker's machine, got '{root / 'none'}'" in error.message


async def test_a_worker_of_the_services_machine_has_the_services_roots(
    site: Site, model_folder: Path, tmp_path: Path
) -> None:
    root = tmp_path / "large-disk"
    shutil.copytree(model_folder, root / "tiny")
    with real_worker(site, "same", LUTHIER_TRAINING_MODEL_ROOTS=str(root)):
        model = await asyncio.wait_for(site.register(root / "tiny", "there"), 120)
        assert model.state == model_pb2.Model.STATE_READY, model.error.message


async def test_a_nul_in_a_path_is_the_callers_fault(site: Site, model_folder: Path) -> None:
    request = model_service_pb2.RegisterBaseModelRequest(
        parent=PARENT, model=model_pb2.Model(directory=f"{model_folder}\x00")
    )
    with pytest.raises(grpc.aio.AioRpcError, match="must have no control characters") as caught:
        await site.models.RegisterBaseModel(request, metadata=site.metadata)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
