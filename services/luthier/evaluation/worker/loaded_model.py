"""A base model in memory with its adapters, and how it is asked."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from luthier.errors import NotFound
from luthier.evaluation.worker.asking import Asker, TextDecoder, asking_of
from luthier.evaluation.worker.engine import EngineClient, Place
from luthier.evaluation.worker.order import Facts
from luthier.runtime.digests import contents_digest
from luthier.text.tokenizer import TOKENIZER_FILE
from luthier.work.limited import Check
from luthier.work.text_pool import Bundle, TextPool
from luthier.worker.v1 import task_pb2

MAX_ADAPTERS = 8
_CHECK_SECONDS = 0.1


class LoadedModel:
    """A base model with its engine; adapters are fetched when first asked for.

    Its tokenizer and its template stay what nobody has read: they are run in the limited processes of `texts`.
    """

    def __init__(self, digest: str, place: Place, facts: Facts, bundle: Bundle, texts: TextPool) -> None:
        self.digest = digest
        self.facts = facts
        self.engine = EngineClient(place, TextDecoder(texts, bundle))
        self._bundle = bundle
        self._texts = texts
        # Those that may be in the model, the longest unused first; False: who asked went before it was known.
        self._is_loaded: OrderedDict[str, bool] = OrderedDict()
        self._users: dict[str, int] = {}
        self._lock = threading.Lock()

    @property
    def tokens_digest(self) -> str:
        """Two models of which this is the same have the same tokens, whatever their templates."""
        return contents_digest({TOKENIZER_FILE: self._bundle.read()[TOKENIZER_FILE]})

    def asker(self, asking: task_pb2.Asking, check: Check = lambda: None) -> Asker:
        """Return what makes prompts for the model, asked in this way, for as long as `check` lets it."""
        # Asked for where the model was registered before Model.eos_token_ids existed.
        return Asker(self._texts, self._bundle, asking_of(asking, self.facts.eos_token_ids), check)

    @contextmanager
    def adapter(self, name: str, load: Callable[[], None], check: Check = lambda: None) -> Iterator[str]:
        """Keep an adapter in the model for the length of a block; yields the name to ask for.

        `load` puts it there when it is not, and may find it there; adapters that nobody uses go, the longest unused
        first, when there are more than `MAX_ADAPTERS`. `check` is called while another one is put there.
        """
        while not self._lock.acquire(timeout=_CHECK_SECONDS):
            check()
        try:
            if not self._is_loaded.get(name):
                self._make_room(name, check)
                self._is_loaded[name] = False
                load()
            self._is_loaded[name] = True
            self._is_loaded.move_to_end(name)
            self._users[name] = self._users.get(name, 0) + 1
        finally:
            self._lock.release()
        try:
            yield name
        finally:
            with self._lock:
                self._is_loaded.move_to_end(name)
                self._users[name] -= 1
                if not self._users[name]:
                    del self._users[name]

    def _make_room(self, name: str, check: Check) -> None:
        others = [other for other in self._is_loaded if other != name]
        idle = [other for other in others if other not in self._users]
        # Those that may not even be there go first.
        idle.sort(key=lambda other: self._is_loaded[other])
        for other in idle[: max(0, len(others) - MAX_ADAPTERS + 1)]:
            self._is_loaded[other] = False
            with suppress(NotFound):
                self.engine.remove_adapter(other, check)
            del self._is_loaded[other]
