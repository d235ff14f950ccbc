"""The base model in memory, its adapters, and the files they come from."""

from __future__ import annotations

import shutil
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import grpc
from transformers import PreTrainedModel

from luthier.errors import DataLoss, Reason
from luthier.evaluation.worker.engine_thread import EngineThread
from luthier.lm.adapter_files import load_adapter
from luthier.lm.engine import Engine
from luthier.lm.load import load_model
from luthier.lm.lora import remove_adapter
from luthier.text.rendering import Renderer
from luthier.text.tokenizer import TokenizerBundle
from luthier.work.cache import BlobCache
from luthier.work.model_files import fetch_model
from luthier.worker.v1 import task_pb2

MAX_ADAPTERS = 8


class LoadedModel:
    """A base model with its tokenizer and engine; adapters are fetched when first asked for."""

    def __init__(self, digest: str, model: PreTrainedModel, bundle: TokenizerBundle) -> None:
        self.digest = digest
        self.model = model
        self.bundle = bundle
        self.engine = Engine(model, decode=bundle.decode)
        self.thread = EngineThread(self.engine)
        self._adapters: OrderedDict[str, None] = OrderedDict()
        self._users: dict[str, int] = {}
        self._lock = threading.Lock()

    def renderer(self) -> Renderer:
        """Return a renderer for prompts with the model's own template and today's date."""
        return Renderer(self.bundle, today=date.today())

    @contextmanager
    def adapter(self, name: str, folder: Path) -> Iterator[str]:
        """Keep the adapter of a folder loaded for the length of a block; yields the name to ask for."""
        with self._lock:
            if name not in self._adapters:
                self._make_room()
                self.thread.run(lambda: load_adapter(self.model, folder, name))
            self._adapters[name] = None
            self._adapters.move_to_end(name)
            self._users[name] = self._users.get(name, 0) + 1
        try:
            yield name
        finally:
            with self._lock:
                self._users[name] -= 1

    def _make_room(self) -> None:
        idle = [name for name in self._adapters if not self._users.get(name)]
        for name in idle[: max(0, len(self._adapters) - MAX_ADAPTERS + 1)]:
            del self._adapters[name]
            self.thread.run(lambda name=name: self._remove(name))  # type: ignore[misc]

    def _remove(self, name: str) -> None:
        self.engine.forget_adapter(name)
        remove_adapter(self.model, name)


class Models:
    """Keeps one base model in memory, and changes it when nobody uses it any more.

    Args:
        address: host:port of ModelService.
        cache: files by digest.
        folder: model folders are laid out below it.
    """

    def __init__(self, address: str, cache: BlobCache, folder: Path) -> None:
        self._channel = grpc.insecure_channel(address)
        self._cache = cache
        self._folder = folder
        self._loaded: LoadedModel | None = None
        self._users = 0
        self._changed = threading.Condition()

    @contextmanager
    def base(self, reference: task_pb2.ModelReference, token: str) -> Iterator[LoadedModel]:
        """Keep a base model loaded for the length of a block; waits while another one is in use.

        Raises:
            LuthierError: its files cannot be fetched or loaded.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._users == 0 or self._is_loaded(reference.digest))
            if self._loaded is None or not self._is_loaded(reference.digest):
                if self._loaded is not None:
                    self._loaded.thread.stop()
                    self._loaded = None
                folder = self._fetch(reference, token)
                self._loaded = LoadedModel(reference.digest, load_model(folder), TokenizerBundle.load(folder))
            loaded = self._loaded
            self._users += 1
        try:
            yield loaded
        finally:
            with self._changed:
                self._users -= 1
                self._changed.notify_all()

    @contextmanager
    def adapter(
        self, loaded: LoadedModel, reference: task_pb2.ModelReference | None, token: str
    ) -> Iterator[str | None]:
        """Keep an adapter loaded for the length of a block; None stays None, the base model itself."""
        if reference is None:
            yield None
            return
        with loaded.adapter(reference.digest[:32], self._fetch(reference, token)) as name:
            yield name

    def _is_loaded(self, digest: str) -> bool:
        return self._loaded is not None and self._loaded.digest == digest

    def _fetch(self, reference: task_pb2.ModelReference, token: str) -> Path:
        if not reference.digest:
            raise DataLoss(f"{reference.name} has no digest", reason=Reason.DATA_CORRUPTED)
        folder = self._folder / reference.digest
        if not folder.exists():
            aside = folder.with_name(f".{folder.name}-{threading.get_ident()}")
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            fetch_model(self._channel, token, reference.name, self._cache, aside)
            aside.rename(folder)
        return folder
