"""One generation engine over one base model and its adapters, for interactive calls and batches at once."""

import logging
import threading
from collections import OrderedDict
from collections.abc import Generator, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from luthier.errors import AlreadyExists, InvalidArgument, NotFound, Reason, ResourceExhausted
from luthier.lm.cache import Prefix
from luthier.lm.decoding import Batch, Events, compute_prefix, require_room
from luthier.lm.generate import Decode, FinishReason, GenerationEvent, GenerationRequest
from luthier.lm.lora import find_adapter, use_adapter
from luthier.lm.passes import Pass, forward_together, reads_beside

_logger = logging.getLogger(__name__)
_PREFIXES_KEPT = 4
_MANY_ROWS = 32
"""Beside so many rows that are answered a short prompt is read before they go on: they take as long, or longer."""
_READS_BEFORE = 4
"""How many times in a row short prompts may go before others."""


_Key = tuple[str | None, tuple[int, ...]]
"""An adapter, and a prefix that is read with it."""


class _Group:
    """One admitted request: its batch (None while its prefix is computed), and when it last had a turn or came."""

    def __init__(self, request: GenerationRequest, turn: int) -> None:
        self.request = request
        self.key: _Key = (request.adapter, request.shared_prefix)
        self.batch: Batch | None = None
        self.reading: Generator[Events, None, Prefix] | None = None
        self.is_apart = False
        self.last_turn = turn

    @property
    def is_read(self) -> bool:
        """Whether its prompts are read."""
        return self.batch is not None and self.batch.is_read

    @property
    def num_rows(self) -> int:
        """How many rows a pass of it has."""
        return 0 if self.batch is None else self.batch.num_rows

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

    A pass makes the next token of every row of all requests of one adapter, which begin and end between passes, and
    reads on in the prompts of those that have come: whole short ones, and in turns what there is room for of longer
    ones. An adapter whose short prompt has come goes before others, and that prompt before many rows of its own, at
    most four times in a row. A prefix that is shared is read by itself; so is each prompt where C++ does not attend, or
    angles depend on the longest row. On a processor a request has the same bits alone and in company, where C++ knows
    the model's type.

    `submit`, `cancel` and `wait` may be called from any thread; `step` from one thread only, which is also
    the only one that may touch the model meanwhile. `decode` turns token ids into text for the events (None:
    no text); `prefill_tokens` bounds the prompt tokens of a pass, and so how long others wait for it. A prefix that
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
        self._reads_before = 0
        self._writers_wait = False
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
                self._groups[request_id] = _Group(request, self._turns)
            self._submitted.clear()
            for request_id in self._cancelled & self._groups.keys():
                events += self._release(request_id).cancelled()
            running = list(self._groups.values())
        with torch.inference_mode():
            return events + self._advance([group for group in running if not self._waits(group)])

    def _waits(self, group: _Group) -> bool:
        """Whether another one computes a group's prefix."""
        if group.key in self._prefixes:
            return False
        return self._computing.get(group.key) not in (None, group)

    def _advance(self, groups: Sequence[_Group]) -> Events:
        """One pass: of the adapter of a short prompt that has come, or of whoever has waited for the longest."""
        groups = [group for group in groups if group.batch is not None or self._begin(group)]
        if not groups:
            return []
        short = [
            group for group in groups if not group.is_read and self._unread(group) <= self._prefill_tokens
        ]
        others = [group for group in groups if group not in short]
        writers = [group for group in others if group.is_read]
        goes_before = bool(short) and self._reads_before < _READS_BEFORE
        if goes_before:
            first, reads_before = short[0], self._reads_before + 1
        elif writers and self._writers_wait:
            # Two passes in a row that leave out all that are answered would be too long a wait; short ones are not.
            first, reads_before = _oldest(writers), self._reads_before
        else:
            first, reads_before = _oldest(others or groups), 0
        together = self._together(first, groups, short, goes_before=goes_before)
        self._turns += 1
        served = [group for group, tokens in together.items() if self._is_served(group, tokens)]
        for group in served:
            group.last_turn = self._turns
        is_overtaken = any(group not in served for group in others)
        self._reads_before = reads_before if is_overtaken else 0
        self._writers_wait = not any(group in together for group in writers)
        return self._read_prefix(first) if first.batch is None else self._pass(together)

    def _is_served(self, group: _Group, tokens: int) -> bool:
        """Whether a pass with so many prompt tokens of a group is a turn of its own, not what others had left."""
        return group.is_read or tokens >= min(self._unread(group), self._prefill_tokens)

    def _together(
        self, first: _Group, groups: Sequence[_Group], short: Sequence[_Group], *, goes_before: bool
    ) -> dict[_Group, int]:
        """Who goes through a pass with the first one, and how many prompt tokens each may read in it."""
        alone = {first: self._prefill_tokens}
        if first.batch is None or first.is_apart:
            return alone
        alike = [
            group
            for group in groups
            if group.batch is not None
            and group.request.adapter == first.request.adapter
            and not group.is_apart
        ]
        writers = dict.fromkeys((group for group in alike if group.is_read), 0)
        if not reads_beside(self._model):
            return writers if first.is_read else alone
        readers = self._readers(first, alike, short)
        if goes_before and sum(group.num_rows for group in writers) >= _MANY_ROWS:
            return {group: tokens for group, tokens in readers.items() if group in short}
        return writers | readers

    def _readers(self, first: _Group, alike: Sequence[_Group], short: Sequence[_Group]) -> dict[_Group, int]:
        """Whose prompts are read, and how much of them: the first one's, whole short ones, what fits of longer ones."""
        unread = [group for group in alike if not group.is_read]
        long = [group for group in unread if group not in short]
        wanted = [first, *short, *sorted(long, key=lambda group: group.last_turn)]
        readers: dict[_Group, int] = {}
        left = self._prefill_tokens
        for group in wanted:
            tokens = self._unread(group)
            fits = tokens <= left if group in short else left >= group.num_rows
            if group in unread and group not in readers and (fits or group is first):
                readers[group] = min(left, tokens)
                left -= readers[group]
        return readers

    def _unread(self, group: _Group) -> int:
        """How many tokens a group has to read, or how much is computed for them."""
        if group.batch is not None:
            return group.batch.num_unread
        return len(group.request.shared_prefix) + sum(map(len, group.request.prompts))

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
        for group in self._groups.values():
            if group.request.adapter == name and group.batch is not None and not group.batch.is_begun:
                group.batch = None

    def _begin(self, group: _Group) -> bool:
        """Make a group's batch if its prefix is there; False: it has failed."""
        request, prefix = group.request, None
        if request.shared_prefix:
            if group.key not in self._prefixes:
                return True
            self._prefixes.move_to_end(group.key)
            prefix = self._prefixes[group.key]
        try:
            group.batch = Batch(self._model, request, self._decode, prefix)
        except Exception as error:  # it belongs to whoever asked
            self._fail(group, error)
            return False
        return True

    def _read_prefix(self, group: _Group) -> Events:
        """Read a piece of a group's prefix, alone."""
        if group.reading is None:
            self._computing[group.key] = group
            group.reading = compute_prefix(self._model, group.request.shared_prefix, self._prefill_tokens)
        try:
            with use_adapter(self._model, group.request.adapter):
                return next(group.reading)
        except StopIteration as read:
            group.reading = None
            del self._computing[group.key]
            self._prefixes[group.key] = read.value
            while len(self._prefixes) > _PREFIXES_KEPT:
                self._prefixes.popitem(last=False)
        except Exception as error:  # it belongs to whoever asked
            self._fail(group, error)
        return []

    def _pass(self, together: Mapping[_Group, int]) -> Events:
        try:
            with use_adapter(self._model, next(iter(together)).request.adapter):
                return self._taken(together)
        except NotFound as error:  # the adapter has left the model
            for group in together:
                self._fail(group, error)
            return []

    def _taken(self, together: Mapping[_Group, int]) -> Events:
        """What the rows of a pass produce."""
        events: Events = []
        for group, logits in self._logits(together):
            assert group.batch is not None
            try:
                events += group.batch.take(logits)
            except Exception as error:  # it belongs to whoever asked, not to the others of this pass
                self._fail(group, error)
            else:
                self._drop_if_done(group)
        return events

    def _logits(self, together: Mapping[_Group, int]) -> list[tuple[_Group, Tensor]]:
        """The logits of each group; those that fail alone too are dropped."""
        passes = [
            (group, one)
            for group, tokens in together.items()
            if (one := self._next_pass(group, tokens)) is not None
        ]
        return self._computed(passes) if passes else []

    def _computed(self, passes: Sequence[tuple[_Group, Pass]]) -> list[tuple[_Group, Tensor]]:
        """The logits of passes, together; if that fails, of prompts one by one and of what is answered together.

        If what is answered fails again, each goes alone, and does so from now on.
        """
        lengths = [one.cache.get_seq_length() for _, one in passes]
        try:
            found = forward_together(self._model, [one for _, one in passes])
        except Exception as error:  # it belongs to one of them
            if len(passes) == 1:
                self._fail(passes[0][0], error)
                return []
            _logger.warning("%d requests fail together and go on apart", len(passes), exc_info=error)
        else:
            return [(group, logits) for (group, _), logits in zip(passes, found, strict=True)]
        for (_, one), length in zip(passes, lengths, strict=True):
            one.cache.rewind(length)
        readers = [[reader] for reader in passes if not reader[0].is_read]
        writers = [writer for writer in passes if writer[0].is_read]
        if readers and writers:
            return [found for part in (writers, *readers) for found in self._computed(part)]
        for group, _ in writers:
            group.is_apart = True
        return [found for one in passes for found in self._computed([one])]

    def _next_pass(self, group: _Group, prefill_tokens: int) -> Pass | None:
        assert group.batch is not None
        try:
            return group.batch.next_pass() if group.is_read else group.batch.next_piece(prefill_tokens)
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


def _oldest(groups: Sequence[_Group]) -> _Group:
    """The one whose last turn was longest ago."""
    return min(groups, key=lambda group: group.last_turn)


def _too_large(request: GenerationRequest, error: Exception) -> ResourceExhausted:
    longest = max(map(len, request.prompts)) + len(request.shared_prefix)
    rows = len(request.prompts) * request.num_samples
    return ResourceExhausted(
        f"answers must fit in the GPU's memory, {rows} at a time of up to {longest} and {request.max_new_tokens} "
        f"tokens do not; ask for fewer or shorter ones: {' '.join(str(error).split())[:300]}",
        reason=Reason.OUT_OF_MEMORY,
    )
