"""One generation engine over one base model and its adapters, for interactive calls and batches at once."""

import logging
import threading
from collections import OrderedDict
from collections.abc import Generator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from luthier.errors import AlreadyExists, InvalidArgument, NotFound, Reason, ResourceExhausted
from luthier.lm.cache import Prefix
from luthier.lm.decoding import Batch, Events, compute_prefix, require_room
from luthier.lm.generate import Decode, FinishReason, GenerationEvent, GenerationRequest
from luthier.lm.lora import find_adapter, use_adapter
from luthier.lm.passes import Pass, forward_together, reads_tokens

_logger = logging.getLogger(__name__)
_PREFIXES_KEPT = 4
_SHORT_READS = 4
"""How many short prompts are read one after the other before those that are answered have a turn."""


_Key = tuple[str | None, tuple[int, ...]]
"""An adapter, and a prefix that is read with it."""


class _Group:
    """One admitted request: its batch (None while its prefix is computed) and how far it is."""

    def __init__(self, request: GenerationRequest) -> None:
        self.request = request
        self.key: _Key = (request.adapter, request.shared_prefix)
        self.batch: Batch | None = None
        self.reading: Generator[Events, None, None] | None = None
        self.is_read = False
        self.is_apart = False
        self.last_turn = 0

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
    """Runs many requests at once, a pass of the model at every step.

    A pass reads a piece of one request's prompts, or makes the next token of every row of all requests of one adapter,
    which begin and end between passes. What is read in one piece is read as soon as it comes, at most four of them
    before the others have a turn; of longer prompts, in turns, a piece follows each pass that makes tokens. On a
    processor a request has the same bits alone and in company, where C++ knows the model's type.

    `submit`, `cancel` and `wait` may be called from any thread; `step` from one thread only, which is also
    the only one that may touch the model meanwhile. `decode` turns token ids into text for the events (None:
    no text); `prefill_tokens` bounds the prompt tokens of one piece, and so how long others wait for it. A prefix that
    several requests share is computed once, for each adapter, and kept until four others are newer.

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
        self._prefixes: OrderedDict[_Key, Prefix] = OrderedDict()
        self._computing: dict[_Key, _Group] = {}
        self._turns = 0
        self._short_reads = 0
        self._may_read = True
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
        """Run one pass. Returns what rows produced in it; nothing when there is nothing to do.

        A request that raises is dropped and its error kept for `take_failures`; what the others produced is returned
        all the same.
        """
        events: Events = []
        with self._lock:
            for request_id, request in self._submitted.items():
                self._groups[request_id] = _Group(request)
            self._submitted.clear()
            for request_id in self._cancelled & self._groups.keys():
                events += self._release(request_id).cancelled()
            running = list(self._groups.values())
        readers = [group for group in running if not group.is_read and not self._waits(group)]
        writers = [group for group in running if group.is_read]
        reader = self._reader(readers, has_writers=bool(writers))
        with torch.inference_mode():
            if reader is not None:
                events += self._read(reader)
            elif writers:
                events += self._write(writers)
        return events

    def _waits(self, group: _Group) -> bool:
        """Whether another one computes a group's prefix."""
        if group.key in self._prefixes:
            return False
        return self._computing.get(group.key) not in (None, group)

    def _reader(self, readers: Sequence[_Group], *, has_writers: bool) -> _Group | None:
        """The group whose turn it is to read; None: it is that of those that write."""
        short = [group for group in readers if self._is_short(group)]
        long = [group for group in readers if group not in short]
        if short and (self._short_reads < _SHORT_READS or not (long or has_writers)):
            self._short_reads += 1
            return short[0]
        if long and (self._may_read or not has_writers):
            self._may_read = False
            if not has_writers:
                self._short_reads = 0
            return min(long, key=lambda group: group.last_turn)
        self._may_read, self._short_reads = True, 0
        return None

    def _is_short(self, group: _Group) -> bool:
        """Whether what is left to read of a group is one piece."""
        if group.batch is not None:
            return group.batch.is_last_piece(self._prefill_tokens)
        prompts, prefix = group.request.prompts, group.request.shared_prefix
        columns = max(map(len, prompts)) * len(prompts)
        unread = sum(map(len, prompts)) if reads_tokens(self._model) else columns
        unread += 0 if group.key in self._prefixes else len(prefix)
        return unread <= self._prefill_tokens

    def take_failures(self) -> dict[str, Exception]:
        """The errors of requests that were dropped since the last call, by id; for the stepping thread."""
        failures, self._failures = self._failures, {}
        return failures

    def forget_adapter(self, name: str) -> None:
        """Drop the prefixes of an adapter that is about to leave the model; for the stepping thread.

        Whoever reads one begins anew, and fails in the next step if the model has no such adapter by then.
        """
        for key in [key for key in self._prefixes if key[0] == name]:
            del self._prefixes[key]
        for key in [key for key in self._computing if key[0] == name]:
            self._computing.pop(key).reading = None

    def _read(self, group: _Group) -> Events:
        """Read a piece of a group's prefix or prompts; the last one makes the first token of its rows."""
        if group.reading is None:
            group.reading = self._reading(group)
        try:
            with use_adapter(self._model, group.request.adapter):
                events = next(group.reading)
        except Exception as error:  # it belongs to whoever asked
            self._fail(group, error)
            return []
        self._turns += 1
        group.last_turn = self._turns
        if events:
            group.is_read, group.reading = True, None
            self._drop_if_done(group)
        return events

    def _reading(self, group: _Group) -> Generator[Events, None, None]:
        request, prefix = group.request, None
        if request.shared_prefix:
            if group.key not in self._prefixes:
                self._computing[group.key] = group
                self._prefixes[group.key] = yield from compute_prefix(
                    self._model, request.shared_prefix, self._prefill_tokens
                )
                del self._computing[group.key]
            self._prefixes.move_to_end(group.key)
            prefix = self._prefixes[group.key]
            while len(self._prefixes) > _PREFIXES_KEPT:
                self._prefixes.popitem(last=False)
        group.batch = Batch(self._model, request, self._decode, prefix)
        yield from group.batch.read(self._prefill_tokens)

    def _write(self, writers: Sequence[_Group]) -> Events:
        """Make the next token of all rows of the adapter that has waited for the longest."""
        first = min(writers, key=lambda group: group.last_turn)
        adapter = first.request.adapter
        groups = [
            group
            for group in writers
            if group is first or not (group.is_apart or first.is_apart or group.request.adapter != adapter)
        ]
        self._turns += 1
        for group in groups:
            group.last_turn = self._turns
        try:
            with use_adapter(self._model, adapter):
                return self._written(groups)
        except NotFound as error:  # the adapter has left the model
            for group in groups:
                self._fail(group, error)
            return []

    def _written(self, groups: Sequence[_Group]) -> Events:
        events: Events = []
        for group, logits in self._logits(groups):
            assert group.batch is not None
            try:
                events += group.batch.take(logits)
            except Exception as error:  # it belongs to whoever asked, not to the others of this pass
                self._fail(group, error)
            else:
                self._drop_if_done(group)
        return events

    def _logits(self, groups: Sequence[_Group]) -> list[tuple[_Group, Tensor]]:
        """The logits of each group; those that fail alone too are dropped."""
        passes = [(group, one) for group in groups if (one := self._next_pass(group)) is not None]
        lengths = [one.cache.get_seq_length() for _, one in passes]
        if not passes:
            return []
        try:
            found = forward_together(self._model, [one for _, one in passes])
        except Exception as error:  # it belongs to one of them
            if len(passes) == 1:
                self._fail(passes[0][0], error)
                return []
            _logger.warning("%d requests fail together and go on alone", len(passes), exc_info=error)
        else:
            return [(group, logits) for (group, _), logits in zip(passes, found, strict=True)]
        alone = []
        for (group, one), length in zip(passes, lengths, strict=True):
            one.cache.rewind(length)
            group.is_apart = True
            try:
                alone.append((group, forward_together(self._model, [one])[0]))
            except Exception as error:  # it belongs to whoever asked
                self._fail(group, error)
        return alone

    def _next_pass(self, group: _Group) -> Pass | None:
        assert group.batch is not None
        try:
            return group.batch.next_pass()
        except Exception as error:  # it belongs to whoever asked
            self._fail(group, error)
            return None

    def _fail(self, group: _Group, error: Exception) -> None:
        request = group.request
        is_memory = isinstance(error, torch.OutOfMemoryError)
        self._failures[request.request_id] = _too_large(request, error) if is_memory else error
        self._drop(group)

    def _drop_if_done(self, group: _Group) -> None:
        if group.batch is not None and group.batch.done:
            self._drop(group)

    def _drop(self, group: _Group) -> None:
        with self._lock:
            self._release(group.request.request_id)

    def _release(self, request_id: str) -> _Group:
        group = self._groups.pop(request_id)
        self._cancelled.discard(request_id)
        if self._computing.get(group.key) is group:
            del self._computing[group.key]
        return group

    def check(self, request: GenerationRequest) -> None:
        """Return if `submit` would admit the request; it raises as `submit` does, from any thread."""
        if request.adapter is not None:
            find_adapter(self._model, request.adapter)
        require_room(self._model, request)


def _too_large(request: GenerationRequest, error: Exception) -> ResourceExhausted:
    longest = max(map(len, request.prompts)) + len(request.shared_prefix)
    rows = len(request.prompts) * request.num_samples
    return ResourceExhausted(
        f"answers must fit in the GPU's memory, {rows} at a time of up to {longest} and {request.max_new_tokens} "
        f"tokens do not; ask for fewer or shorter ones: {' '.join(str(error).split())[:300]}",
        reason=Reason.OUT_OF_MEMORY,
    )
