"""The base models in memory, each in a process of its own, and the files that they and their adapters come from."""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from luthier.errors import Reason, ResourceExhausted
from luthier.evaluation.worker.engine import Start
from luthier.evaluation.worker.loaded_model import LoadedModel
from luthier.evaluation.worker.order import LoadOrder
from luthier.evaluation.worker.room import Room
from luthier.lm.precision import Precision
from luthier.runtime.digests import contents_digest
from luthier.text.tokenizer import BUNDLE_FILES
from luthier.work.cache import BlobCache
from luthier.work.limited import Check
from luthier.work.model_files import fetch_model, list_model
from luthier.work.peers import channel
from luthier.work.retry import Token
from luthier.work.standing import Log
from luthier.work.text_pool import TEXT_LIMITS, Bundle, TextPool
from luthier.worker.v1 import task_pb2

MAX_WAITING = 1
"""Who may wait with a bound for another base to be free: fewer than there are slots, so that others find one."""
_RETRY_SECONDS = 5.0
_CHECK_SECONDS = 0.1
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Base:
    """A base model as somebody wants it: its weights, and what they are held in."""

    reference: task_pb2.ModelReference
    precision: Precision = "BFLOAT16"
    is_reward: bool = False

    @property
    def key(self) -> str:
        """What two that are the same share."""
        return f"{self.reference.digest}/{self.precision}{'/reward' * self.is_reward}"


@dataclass(slots=True, kw_only=True)
class _Held:
    """A base model in memory, the bytes of its files, which it takes at most, and how many use it."""

    loaded: LoadedModel
    size_bytes: int
    users: int = 0


class Models:
    """Keeps base models in memory, those that were used last, as many as fit.

    One that is used stays; of the others the longest unused leave when another one needs the memory, and their process
    with them. One whose process has ended is loaded anew for the next who wants it. On a GPU, whose memory is not known
    here, there is one at a time. Files are fetched and loaded outside of the lock: whoever waits meanwhile goes on
    hearing whether it still should.

    Args:
        address: host:port of ModelService.
        cache: files by digest.
        folder: models are laid out below it while they are loaded; what an earlier process left there goes.
        start: begins to load a model.
        room: tells whether one more fits, and whether memory is short.
    """

    def __init__(
        self,
        address: str,
        cache: BlobCache,
        folder: Path,
        start: Start,
        room: Room = Room(),  # noqa: B008 - it never changes
    ) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        self._channel = channel(address)
        self._cache = cache
        self._folder = folder
        self._start = start
        self._room = room
        self._held: OrderedDict[str, _Held] = OrderedDict()
        self._loading = ""
        self._num_waiting = 0
        self._changed = threading.Condition()
        self._texts = TextPool(TEXT_LIMITS)

    @contextmanager
    def base(
        self,
        reference: task_pb2.ModelReference,
        token: Token,
        check: Check = lambda: None,
        *,
        precision: Precision = "BFLOAT16",
        is_reward: bool = False,
        wait_seconds: float = math.inf,
        log: Log = lambda _text, _severity: None,
    ) -> Iterator[LoadedModel]:
        """Keep a base model loaded for the length of a block; waits while others are used and leave it no memory.

        One that is wanted in two precisions is there twice. `is_reward`: it is a reward model with all its weights.

        With `wait_seconds` the wait for others' end is bounded, and so are those who wait with a bound: beyond
        `MAX_WAITING` they are refused at once. `log` is told where the model's process was at if that crashes or hangs.

        Raises:
            ResourceExhausted: OVERLOADED, others stayed in use; OUT_OF_MEMORY, there was none to load it.
            Unavailable: CRASHED or STALLED, the process that loaded it.
            LuthierError: its files cannot be fetched or loaded, or what `check` raised meanwhile.
        """
        wanted = _Base(reference=reference, precision=precision, is_reward=is_reward)
        held = self._taken(wanted, token, check, wait_seconds)
        try:
            with held.loaded.engine.reporting(log):
                yield held.loaded
        finally:
            with self._changed:
                held.users -= 1
                self._changed.notify_all()

    @contextmanager
    def adapter(
        self,
        loaded: LoadedModel,
        reference: task_pb2.ModelReference | None,
        token: Token,
        check: Check = lambda: None,
        *,
        is_reward: bool = False,
    ) -> Iterator[str | None]:
        """Keep an adapter loaded for the length of a block; None stays None, the base model itself.

        `is_reward`: it is a reward model's, and has a head.

        Raises:
            LuthierError: its files cannot be fetched or loaded, or what `check` raised meanwhile.
        """
        if reference is None:
            yield None
            return
        name = reference.digest[:32]

        def load() -> None:
            put = loaded.engine.load_reward if is_reward else loaded.engine.load_adapter
            with self._fetched(reference, token, check) as folder:
                put(folder, name, check)

        with loaded.adapter(name, load, check):
            yield name

    def relieve(self) -> None:
        """Where memory is short, let the model leave that was used longest ago, of those that nobody uses."""
        if not self._room.is_short():
            return
        with self._changed:
            gone = self._popped_idle()
        if gone is not None:
            _logger.info("a base model leaves: memory is short", extra={"digest": gone.loaded.digest})
            gone.loaded.engine.close()

    def close(self) -> None:
        """Take the models out of memory and hang up; nobody may use them any more."""
        with self._changed:
            gone = list(self._held.values())
            self._held.clear()
        for held in gone:
            held.loaded.engine.close()
        self._texts.close()
        self._channel.close()

    def _taken(self, wanted: _Base, token: Token, check: Check, wait_seconds: float) -> _Held:
        """Return a base model with one more user. Raises as `base`."""
        with self._changed:
            found = self._found(wanted)
        if found is not None:
            return found
        files = list_model(self._channel, token, wanted.reference, check)
        size_bytes = sum(file.size_bytes for file in files)
        while True:
            with self._changed:
                found = self._found_or_free(wanted, size_bytes, check, wait_seconds)
                if found is None:
                    self._loading = wanted.key
            # Somebody may take what nobody used while files come: then it waits as before.
            if (held := found or self._loaded(wanted, size_bytes, token, check)) is not None:
                return held

    def _loaded(self, wanted: _Base, size_bytes: int, token: Token, check: Check) -> _Held | None:
        """Return a base model that was loaded, with one user; None where there is no room for it any more."""
        try:
            return self._load(wanted, size_bytes, token, check)
        finally:
            with self._changed:
                self._loading = ""
                self._changed.notify_all()

    def _found(self, wanted: _Base) -> _Held | None:
        """Return a base model that is there, with one more user."""
        held = self._held.get(wanted.key)
        if held is None:
            return None
        if held.loaded.engine.ended is not None:
            del self._held[wanted.key]
            return None
        self._held.move_to_end(wanted.key)
        held.users += 1
        return held

    def _found_or_free(
        self, wanted: _Base, size_bytes: int, check: Check, wait_seconds: float
    ) -> _Held | None:
        """Return a base model with one more user, or None once it may be loaded. Raises ResourceExhausted."""
        if (held := self._found(wanted)) is not None or self._is_free_for(size_bytes):
            return held
        bounded = math.isfinite(wait_seconds)
        if bounded and self._num_waiting >= MAX_WAITING and self._loading != wanted.key:
            raise self._must_wait(wanted)
        self._num_waiting += bounded
        deadline = time.monotonic() + wait_seconds
        try:
            while True:
                self._changed.wait(_CHECK_SECONDS)
                if (held := self._found(wanted)) is not None or self._is_free_for(size_bytes):
                    return held
                check()
                if time.monotonic() > deadline and self._loading != wanted.key:
                    raise self._must_wait(wanted)
        finally:
            self._num_waiting -= bounded

    def _must_wait(self, wanted: _Base) -> ResourceExhausted:
        name = wanted.reference.name
        why = "this worker has no memory for one more base model, and another one is in use"
        if self._loading:
            why = "this worker loads another base model, one after the other"
        return ResourceExhausted(
            f"{name} must wait: {why}; try again",
            reason=Reason.OVERLOADED,
            metadata={"model": name},
            retry_after_seconds=_RETRY_SECONDS,
        )

    def _is_free_for(self, size_bytes: int) -> bool:
        """Tell whether a model may be loaded now, those that nobody uses gone if need be."""
        in_use = [held for held in self._held.values() if held.users and held.loaded.engine.ended is None]
        return not self._loading and self._fit(size_bytes, in_use)

    def _fit(self, size_bytes: int, held: list[_Held]) -> bool:
        """Tell whether a model fits beside some that are held."""
        if not held:
            return True
        on_processor = all(one.loaded.facts.device == "cpu" for one in held)
        return on_processor and self._room.fits(size_bytes, sum(one.size_bytes for one in held))

    def _load(self, wanted: _Base, size_bytes: int, token: Token, check: Check) -> _Held | None:
        with self._fetched(wanted.reference, token, check) as folder:
            if not self._make_room(size_bytes):
                return None
            order = LoadOrder(folder=folder, precision=wanted.precision, is_reward=wanted.is_reward)
            place = self._start(order)
            try:
                facts = place.begun(check)
            except BaseException:
                place.close()
                raise
            files = {name: (folder / name).read_bytes() for name in BUNDLE_FILES if (folder / name).exists()}
        bundle = Bundle(key=contents_digest(files), read=lambda: files)
        loaded = LoadedModel(wanted.reference.digest, place, facts, bundle, self._texts)
        held = _Held(loaded=loaded, size_bytes=size_bytes, users=1)
        with self._changed:
            self._held[wanted.key] = held
        return held

    def _make_room(self, size_bytes: int) -> bool:
        """Let those leave that nobody uses, the longest unused first, until a model fits; False: it does not."""
        while True:
            with self._changed:
                there = [held for held in self._held.values() if held.loaded.engine.ended is None]
                if self._fit(size_bytes, there):
                    return True
                gone = self._popped_idle()
            if gone is None:
                return False
            gone.loaded.engine.close()

    def _popped_idle(self) -> _Held | None:
        """Take out what was used longest ago, of what nobody uses."""
        idle = next((key for key, held in self._held.items() if not held.users), None)
        return None if idle is None else self._held.pop(idle)

    @contextmanager
    def _fetched(self, reference: task_pb2.ModelReference, token: Token, check: Check) -> Iterator[Path]:
        """Lay a model's files out for the length of a block; weights that are mapped stay readable after it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            yield fetch_model(self._channel, token, reference, self._cache, Path(folder), check)
