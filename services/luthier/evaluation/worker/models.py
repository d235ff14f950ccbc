"""The base model in memory, its adapters, and the files they come from."""

from __future__ import annotations

import math
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel

from luthier.errors import Reason, ResourceExhausted
from luthier.evaluation.worker.asking import Asker, TextDecoder, asking_of
from luthier.evaluation.worker.engine_thread import Check, EngineThread
from luthier.lm.adapter_files import load_adapter
from luthier.lm.engine import Engine
from luthier.lm.load import eos_token_ids, load_model
from luthier.lm.lora import remove_adapter
from luthier.runtime.digests import contents_digest
from luthier.text.tokenizer import BUNDLE_FILES
from luthier.work.cache import BlobCache
from luthier.work.limited_child import Limits
from luthier.work.model_files import fetch_model
from luthier.work.peers import channel
from luthier.work.retry import Token
from luthier.work.text_pool import PROMPT_LIMITS, Bundle, TextPool
from luthier.worker.v1 import task_pb2

MAX_ADAPTERS = 8
MAX_WAITING = 1
"""Who may wait with a bound for another base to be free: fewer than there are slots, so that others find one."""
_RETRY_SECONDS = 5.0
_CHECK_SECONDS = 0.1


class LoadedModel:
    """A base model with its engine; adapters are fetched when first asked for.

    Its tokenizer and its template stay what nobody has read: they are run in the limited processes of `texts`.
    """

    def __init__(self, digest: str, model: PreTrainedModel, bundle: Bundle, texts: TextPool) -> None:
        self.digest = digest
        self.model = model
        # Asked for where the model was registered before Model.eos_token_ids existed.
        self._file_eos_token_ids = eos_token_ids(model)
        self.engine = Engine(model)
        self.thread = EngineThread(self.engine, TextDecoder(texts, bundle))
        self._bundle = bundle
        self._texts = texts
        self._adapters: OrderedDict[str, None] = OrderedDict()
        self._users: dict[str, int] = {}
        self._lock = threading.Lock()

    def asker(self, asking: task_pb2.Asking, check: Check = lambda: None) -> Asker:
        """Return what makes prompts for the model, asked in this way, for as long as `check` lets it."""
        return Asker(self._texts, self._bundle, asking_of(asking, self._file_eos_token_ids), check)

    @contextmanager
    def adapter(self, name: str, load: Callable[[], None], check: Check = lambda: None) -> Iterator[str]:
        """Keep an adapter in the model for the length of a block; yields the name to ask for.

        `load` puts it there when it is not; adapters that nobody uses go, the longest unused first, when there
        are more than `MAX_ADAPTERS`. `check` is called while another one is put there.
        """
        while not self._lock.acquire(timeout=_CHECK_SECONDS):
            check()
        try:
            if name not in self._adapters:
                self._make_room()
                load()
            self._adapters[name] = None
            self._adapters.move_to_end(name)
            self._users[name] = self._users.get(name, 0) + 1
        finally:
            self._lock.release()
        try:
            yield name
        finally:
            with self._lock:
                self._adapters.move_to_end(name)
                self._users[name] -= 1
                if not self._users[name]:
                    del self._users[name]

    def _make_room(self) -> None:
        idle = [name for name in self._adapters if name not in self._users]
        for name in idle[: max(0, len(self._adapters) - MAX_ADAPTERS + 1)]:
            del self._adapters[name]
            self.thread.run(lambda name=name: self._remove(name))  # type: ignore[misc]

    def _remove(self, name: str) -> None:
        self.engine.forget_adapter(name)
        remove_adapter(self.model, name)


class Models:
    """Keeps one base model in memory, and changes it when nobody uses it any more.

    Files are fetched and loaded outside of the lock: whoever waits meanwhile goes on hearing whether it still should.

    Args:
        address: host:port of ModelService.
        cache: files by digest.
        folder: models are laid out below it while they are loaded; what an earlier process left there goes.
        limits: what their templates and tokenizers may take for one prompt.
    """

    def __init__(
        self,
        address: str,
        cache: BlobCache,
        folder: Path,
        device: torch.device | str = "cpu",
        limits: Limits = PROMPT_LIMITS,
    ) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        self._channel = channel(address)
        self._cache = cache
        self._folder = folder
        self._device = device
        self._loaded: LoadedModel | None = None
        self._users = 0
        self._loading = ""
        self._num_waiting = 0
        self._changed = threading.Condition()
        self._texts = TextPool(limits)

    @contextmanager
    def base(
        self,
        reference: task_pb2.ModelReference,
        token: Token,
        check: Check = lambda: None,
        *,
        wait_seconds: float = math.inf,
    ) -> Iterator[LoadedModel]:
        """Keep a base model loaded for the length of a block; waits while another one is in use.

        With `wait_seconds` the wait for another base's end is bounded, and so are those who wait with a bound:
        beyond `MAX_WAITING` they are refused at once.

        Raises:
            ResourceExhausted: OVERLOADED, another base stayed in use.
            LuthierError: its files cannot be fetched or loaded, or what `check` raised meanwhile.
        """
        with self._changed:
            self._wait_for(reference, check, wait_seconds)
            self._users += 1
            is_there = self._has(reference)
            if not is_there:
                self._loading = reference.digest
        try:
            if not is_there:
                self._change(reference, token, check)
            assert self._loaded is not None, "it is loaded, and kept as long as it has a user"
            yield self._loaded
        finally:
            with self._changed:
                self._users -= 1
                self._changed.notify_all()

    @contextmanager
    def adapter(
        self,
        loaded: LoadedModel,
        reference: task_pb2.ModelReference | None,
        token: Token,
        check: Check = lambda: None,
    ) -> Iterator[str | None]:
        """Keep an adapter loaded for the length of a block; None stays None, the base model itself.

        Raises:
            LuthierError: its files cannot be fetched or loaded, or what `check` raised meanwhile.
        """
        if reference is None:
            yield None
            return
        name = reference.digest[:32]

        def load() -> None:
            with self._fetched(reference, token, check) as folder:
                loaded.thread.run(lambda: load_adapter(loaded.model, folder, name))

        with loaded.adapter(name, load, check):
            yield name

    def close(self) -> None:
        """Take the model out of memory and hang up; nobody may use it any more."""
        if self._loaded is not None:
            self._loaded.thread.stop()
            self._loaded = None
        self._texts.close()
        self._channel.close()

    def _has(self, reference: task_pb2.ModelReference) -> bool:
        return self._loaded is not None and self._loaded.digest == reference.digest

    def _is_free_for(self, reference: task_pb2.ModelReference) -> bool:
        return not self._loading and (self._users == 0 or self._has(reference))

    def _wait_for(self, reference: task_pb2.ModelReference, check: Check, wait_seconds: float) -> None:
        if self._is_free_for(reference):
            return
        bounded = math.isfinite(wait_seconds)
        if bounded and self._num_waiting >= MAX_WAITING and self._loading != reference.digest:
            raise _in_use(reference)
        self._num_waiting += bounded
        deadline = time.monotonic() + wait_seconds
        try:
            while not self._changed.wait_for(lambda: self._is_free_for(reference), _CHECK_SECONDS):
                check()
                if time.monotonic() > deadline and self._loading != reference.digest:
                    raise _in_use(reference)
        finally:
            self._num_waiting -= bounded

    def _change(self, reference: task_pb2.ModelReference, token: Token, check: Check) -> None:
        """Load another base; nobody else touches what is loaded while `_loading` is set."""
        try:
            if self._loaded is not None:
                self._loaded.thread.stop()
                self._loaded = None
            self._loaded = self._load(reference, token, check)
        finally:
            with self._changed:
                self._loading = ""
                self._changed.notify_all()

    def _load(self, reference: task_pb2.ModelReference, token: Token, check: Check) -> LoadedModel:
        with self._fetched(reference, token, check) as folder:
            files = {name: (folder / name).read_bytes() for name in BUNDLE_FILES if (folder / name).exists()}
            bundle = Bundle(key=contents_digest(files), read=lambda: files)
            return LoadedModel(reference.digest, load_model(folder, device=self._device), bundle, self._texts)

    @contextmanager
    def _fetched(self, reference: task_pb2.ModelReference, token: Token, check: Check) -> Iterator[Path]:
        """Lay a model's files out for the length of a block; weights that are mapped stay readable after it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            yield fetch_model(self._channel, token, reference, self._cache, Path(folder), check)


def _in_use(reference: task_pb2.ModelReference) -> ResourceExhausted:
    return ResourceExhausted(
        f"{reference.name} must wait: this worker keeps one base model in memory, and another one is in use; try again",
        reason=Reason.OVERLOADED,
        metadata={"model": reference.name},
        retry_after_seconds=_RETRY_SECONDS,
    )
