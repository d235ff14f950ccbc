"""One generation engine over one base model and its adapters, for interactive calls and batches at once."""

import threading
from collections import OrderedDict
from collections.abc import Generator

import torch
from transformers import PreTrainedModel

from luthier.errors import AlreadyExists, InvalidArgument, Reason, ResourceExhausted
from luthier.lm.decoding import Batch, Events, Prefix, compute_prefix, require_room
from luthier.lm.generate import Decode, FinishReason, GenerationEvent, GenerationRequest
from luthier.lm.lora import find_adapter, use_adapter

_PREFIXES_KEPT = 4


class _Group:
    """One admitted request: its batch (None while the prefix is computed) and the rest of its work."""

    def __init__(self, request: GenerationRequest) -> None:
        self.request = request
        self.batch: Batch | None = None
        self.work: Generator[Events, None, None] | None = None

    def cancelled(self) -> Events:
        if self.batch is not None:
            return self.batch.cancelled()
        return [
            GenerationEvent(
                request_id=self.request.request_id,
                row=row,
                token_ids=(),
                text="",
                num_generated=0,
                finish_reason=FinishReason.CANCELLED,
            )
            for row in range(len(self.request.prompts) * self.request.num_samples)
        ]


class Engine:
    """Runs many requests at once, one piece of each per step, in turn.

    `submit`, `cancel` and `wait` may be called from any thread; `step` from one thread only, which is also
    the only one that may touch the model meanwhile. `decode` turns token ids into text for the events (None:
    no text); `prefill_tokens` bounds the prompt tokens of one piece, and so how long an interactive request
    waits for a batch. A prefix that several requests share is kept, for each adapter, until four others are
    newer; requests that are submitted while it is being computed compute it for themselves.

    Memory: keys and values for every row's prompt and new tokens, once more for each prefix kept. The caller
    bounds how many rows it submits.
    """

    def __init__(
        self, model: PreTrainedModel, *, decode: Decode | None = None, prefill_tokens: int = 2048
    ) -> None:
        if prefill_tokens < 1:
            raise InvalidArgument(f"prefill_tokens must be at least 1, got {prefill_tokens}")
        self._model = model
        self._decode = decode
        self._prefill_tokens = prefill_tokens
        self._groups: dict[str, _Group] = {}
        self._prefixes: OrderedDict[tuple[str | None, tuple[int, ...]], Prefix] = OrderedDict()
        self._lock = threading.Condition()
        self._submitted: dict[str, GenerationRequest] = {}
        self._cancelled: set[str] = set()
        self._failures: dict[str, Exception] = {}

    def submit(self, request: GenerationRequest) -> None:
        """Admit a request before the next step.

        Raises:
            InvalidArgument: a token id is outside the vocabulary, or a row would outgrow the model's context.
            NotFound: the model has no adapter of that name.
            AlreadyExists: a request of that id is running.
        """
        self.check(request)
        with self._lock:
            if request.request_id in self._submitted or request.request_id in self._groups:
                raise AlreadyExists(f"a request with id {request.request_id!r} is running")
            self._submitted[request.request_id] = request
            self._lock.notify_all()

    def cancel(self, request_id: str) -> None:
        """End a request before the next step, which says CANCELLED for its open rows; ignores unknown ids."""
        with self._lock:
            if request_id in self._submitted or request_id in self._groups:
                self._cancelled.add(request_id)
                self._lock.notify_all()

    def wait(self, timeout_seconds: float) -> bool:
        """Sleep until there is something to do; False when there is nothing after `timeout_seconds`."""
        with self._lock:
            return self._lock.wait_for(lambda: bool(self._submitted or self._groups), timeout_seconds)

    def running(self) -> frozenset[str]:
        """Ids of the requests that are submitted or under way."""
        with self._lock:
            return frozenset(self._submitted) | frozenset(self._groups)

    def step(self) -> Events:
        """One piece of work for every running request, in the order of their admission.

        A piece is a part of the prompts or one new token for each row. Returns what the rows produced;
        nothing when there is nothing to do. A request that raises is dropped and its error kept for
        `take_failures`; what the others produced is returned all the same.
        """
        events: Events = []
        with self._lock:
            for request_id, request in self._submitted.items():
                self._groups[request_id] = _Group(request)
            self._submitted.clear()
            for request_id in self._cancelled & self._groups.keys():
                events += self._groups.pop(request_id).cancelled()
            self._cancelled.clear()
            running = list(self._groups.values())
        for group in running:
            try:
                events += self._advance(group)
            except torch.OutOfMemoryError as error:
                self._failures[group.request.request_id] = _too_large(group.request, error)
            except Exception as error:  # it belongs to whoever asked, not to the others of this step
                self._failures[group.request.request_id] = error
        return events

    def take_failures(self) -> dict[str, Exception]:
        """The errors of requests that were dropped since the last call, by id; for the stepping thread."""
        failures, self._failures = self._failures, {}
        return failures

    def forget_adapter(self, name: str) -> None:
        """Drop the kept prefixes of an adapter that is about to leave the model; for the stepping thread."""
        for key in [key for key in self._prefixes if key[0] == name]:
            del self._prefixes[key]

    def _advance(self, group: _Group) -> Events:
        if group.work is None:
            group.work = self._work(group)
        try:
            with torch.inference_mode(), use_adapter(self._model, group.request.adapter):
                events = next(group.work)
        except BaseException:
            self._drop(group)
            raise
        if group.batch is not None and group.batch.done:
            self._drop(group)
        return events

    def _drop(self, group: _Group) -> None:
        with self._lock:
            del self._groups[group.request.request_id]

    def _work(self, group: _Group) -> Generator[Events, None, None]:
        request = group.request
        prefix = None
        if request.shared_prefix:
            key = (request.adapter, request.shared_prefix)
            if key not in self._prefixes:
                self._prefixes[key] = yield from compute_prefix(self._model, key[1], self._prefill_tokens)
            self._prefixes.move_to_end(key)
            prefix = self._prefixes[key]
            while len(self._prefixes) > _PREFIXES_KEPT:
                self._prefixes.popitem(last=False)
        group.batch = Batch(self._model, request, self._decode, prefix)
        yield from group.batch.run(self._prefill_tokens)

    def check(self, request: GenerationRequest) -> None:
        """Return if `submit` would admit the request; it raises as `submit` does, from any thread."""
        if request.adapter is not None:
            find_adapter(self._model, request.adapter)
        require_room(self._model, request)


def _too_large(request: GenerationRequest, error: torch.OutOfMemoryError) -> ResourceExhausted:
    longest = max(map(len, request.prompts)) + len(request.shared_prefix)
    rows = len(request.prompts) * request.num_samples
    return ResourceExhausted(
        f"answers must fit in the GPU's memory, {rows} at a time of up to {longest} and {request.max_new_tokens} "
        f"tokens do not; ask for fewer or shorter ones: {' '.join(str(error).split())[:300]}",
        reason=Reason.OUT_OF_MEMORY,
    )
