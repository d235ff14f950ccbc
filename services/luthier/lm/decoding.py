"""One request's way through the model, cut into pieces of work that an engine can interleave.

Shape suffixes: B rows, Q new columns, C prompt columns, V vocabulary.
"""

from bisect import bisect_right
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from luthier.errors import InvalidArgument, Reason
from luthier.lm.cache import BatchCache, Prefix
from luthier.lm.draw import draw, draw_rows, output_not_finite, row_generator
from luthier.lm.generate import Decode, FinishReason, GenerationEvent, GenerationRequest, TextAssembler
from luthier.lm.passes import Head, Pass, forward_together, plain_logits, reads_tokens, scaled_logits

Events = list[GenerationEvent]


@dataclass(slots=True, kw_only=True)
class _Row:
    index: int
    random: torch.Generator
    text: TextAssembler | None
    num_generated: int = 0
    finished: bool = False


class Batch:
    """The rows of one request while they generate: prompts that all end in one column of their cache.

    What is before a row in the cache is room alone: prompts are read token by token where C++ attends, a column of all
    rows at a time where it does not. A finished row is computed along until an eighth of the batch is finished, then
    all of them leave it. A row whose logits are not finite ends the request: FailedPrecondition OUTPUT_NOT_FINITE names
    it.
    """

    def __init__(
        self, model: PreTrainedModel, request: GenerationRequest, decode: Decode | None, prefix: Prefix | None
    ) -> None:
        self._model = model
        self._request = request
        self._prefix = prefix
        self._rows = [
            _Row(
                index=index,
                random=row_generator(request.seed, request.first_row + index),
                text=None if decode is None else TextAssembler(decode),
            )
            for index in range(len(request.prompts) * request.num_samples)
        ]
        self._head: Head = (
            partial(scaled_logits, temperature=request.temperature) if request.want_logprobs else plain_logits
        )
        width = max(len(prompt) for prompt in request.prompts)
        capacity = width + request.max_new_tokens
        # Prompts that are sampled several times are read into a cache that has room for them alone.
        self._cache = BatchCache(
            model.config.num_hidden_layers, capacity if request.num_samples == 1 else width
        )
        self._capacity = capacity
        padded = [[0] * (width - len(prompt)) + list(prompt) for prompt in request.prompts]
        self._prompt_BC = torch.tensor(padded, device=model.device)
        self._first = [width - len(prompt) for prompt in request.prompts]
        self._offset_B = len(request.shared_prefix) - torch.tensor(self._first, device=model.device)
        self._tokens: list[int] = []
        self.is_read = False

    def run(self, prefill_tokens: int) -> Iterator[Events]:
        """Yields after each piece of work: `prefill_tokens` prompt tokens or a new token per row."""
        yield from self.read(prefill_tokens)
        while not self.done:
            yield self.take(forward_together(self._model, [self.next_pass()])[0])

    def read(self, prefill_tokens: int) -> Generator[Events, None, None]:
        """Read the prompts; yields after each piece of `prefill_tokens`, after the last one every row's first token."""
        while not self.is_read:
            yield self.take(forward_together(self._model, [self.next_piece(prefill_tokens)])[0])

    def next_piece(self, prefill_tokens: int) -> Pass:
        """What reads on in the prompts: so many tokens at most, or one of each row. The last piece makes logits."""
        begin, C = self._cache.get_seq_length(), self._prompt_BC.shape[1]
        end = min(C, self._end_of_piece(begin, prefill_tokens))
        lengths = [len(self._request.shared_prefix) + C - first for first in self._first]
        one = self._pass(self._prompt_BC[:, begin:end], self._head if end == C else None)
        return one._replace(lengths=lengths)

    @property
    def num_rows(self) -> int:
        """How many rows its passes have."""
        return len(self._first)

    @property
    def is_begun(self) -> bool:
        """Whether any of the prompts is read."""
        return self._cache.get_seq_length() > 0

    @property
    def num_unread(self) -> int:
        """How many tokens of the prompts are not read, or columns of all rows where those are read."""
        begin, C = self._cache.get_seq_length(), self._prompt_BC.shape[1]
        if not reads_tokens(self._model):
            return max(0, C - begin) * len(self._first)
        return sum(max(0, C - max(begin, first)) for first in self._first)

    def _end_of_piece(self, begin: int, prefill_tokens: int) -> int:
        C, firsts = self._prompt_BC.shape[1], sorted(self._first)
        if not reads_tokens(self._model):
            return begin + max(1, prefill_tokens // len(firsts))
        end, left = begin, prefill_tokens
        while end < C:
            num_tokens = bisect_right(firsts, end)
            if end > begin and left < num_tokens:
                break
            left -= num_tokens
            end += 1
        return end

    def next_pass(self) -> Pass:
        """What makes the logits of the rows' next tokens, once the prompts are read."""
        kept = self._compact()
        ids_BQ = torch.tensor([[self._tokens[place]] for place in kept], device=self._model.device)
        return self._pass(ids_BQ, self._head)

    def take(self, logits_BV: Tensor) -> Events:
        """Choose every row's next token, of the logits of a pass; nothing comes of a piece with more behind it."""
        if not self.is_read:
            if self._cache.get_seq_length() < self._prompt_BC.shape[1]:
                return []
            self.is_read = True
            if self._request.num_samples > 1:
                logits_BV = self._repeat(logits_BV)
        self._tokens, events = self._choose(logits_BV)
        return events

    @property
    def done(self) -> bool:
        """Whether every row has finished."""
        return all(row.finished for row in self._rows)

    def cancelled(self) -> Events:
        """The last events of the rows that have not finished."""
        return [
            self._event(row, (), "" if row.text is None else row.text.finish(), FinishReason.CANCELLED)
            for row in self._rows
            if not row.finished
        ]

    def _repeat(self, logits_BV: Tensor) -> Tensor:
        """Make each prompt's row, all of it read, a row for each of its samples."""
        times = self._request.num_samples
        self._cache.repeat(times, self._capacity)
        self._offset_B = self._offset_B.repeat_interleave(times)
        self._first = [first for first in self._first for _ in range(times)]
        return logits_BV.repeat_interleave(times, dim=0)

    def _pass(self, ids_BQ: Tensor, head: Head | None) -> Pass:
        begin = self._cache.get_seq_length()
        columns = torch.arange(begin, begin + ids_BQ.shape[1], device=ids_BQ.device)
        positions = (columns + self._offset_B[:, None]).clamp(min=0)
        return Pass(ids_BQ, positions, self._cache, self._prefix, head, self._first)

    def _choose(self, logits_BV: Tensor) -> tuple[list[int], Events]:
        request = self._request
        self._require_finite(logits_BV)
        if request.want_logprobs:
            randoms = [None if row.finished else row.random for row in self._rows]
            drawn = zip(self._rows, *draw_rows(logits_BV, randoms), strict=True)
            chosen = [(row, token, logprob) for row, token, logprob in drawn]
            events = [
                self._accept(row, token, (logprob,)) for row, token, logprob in chosen if not row.finished
            ]
            return [token for _, token, _ in chosen], events
        tokens: list[int] = logits_BV.argmax(dim=-1).tolist()
        events = []
        for place, row in enumerate(self._rows):
            if row.finished:
                continue
            if request.temperature > 0:
                tokens[place] = draw(logits_BV[place], request.temperature, request.top_p, row.random)
            events.append(self._accept(row, tokens[place]))
        return tokens, events

    def _require_finite(self, logits_BV: Tensor) -> None:
        # One pass, which costs less than the choice itself: a sum is not finite when one of its parts is not.
        if bool(logits_BV.sum(dim=-1).isfinite().all()):
            return
        for place, row in enumerate(self._rows):
            if not row.finished and not bool(logits_BV[place].isfinite().all()):
                raise output_not_finite(f"row {row.index} after {row.num_generated} new tokens")

    def _accept(self, row: _Row, token: int, logprobs: tuple[float, ...] = ()) -> GenerationEvent:
        if token in self._request.stop_token_ids:
            row.finished = True
            row.num_generated += len(logprobs)
            text = "" if row.text is None else row.text.finish()
            return self._event(row, (token,) if logprobs else (), text, FinishReason.STOP, logprobs)
        row.num_generated += 1
        text = "" if row.text is None else row.text.push(token)
        row.finished = row.num_generated == self._request.max_new_tokens
        if row.finished and row.text is not None:
            text += row.text.finish()
        return self._event(row, (token,), text, FinishReason.LENGTH if row.finished else None, logprobs)

    def _event(
        self,
        row: _Row,
        token_ids: tuple[int, ...],
        text: str,
        reason: FinishReason | None,
        logprobs: tuple[float, ...] = (),
    ) -> GenerationEvent:
        return GenerationEvent(
            request_id=self._request.request_id,
            row=row.index,
            token_ids=token_ids,
            text=text,
            num_generated=row.num_generated,
            finish_reason=reason,
            logprobs=logprobs,
        )

    def _compact(self) -> list[int]:
        """Drop finished rows when they are many; returns the places (before) of the rows that stay."""
        places = list(range(len(self._rows)))
        alive = [place for place in places if not self._rows[place].finished]
        if 8 * (len(places) - len(alive)) < len(places):
            return places
        self._rows = [self._rows[place] for place in alive]
        self._cache.keep(alive)
        self._offset_B = self._offset_B[alive]
        self._first = [self._first[place] for place in alive]
        return alive


def require_room(model: PreTrainedModel, request: GenerationRequest) -> None:
    """Check that a model can read a request's tokens, and that every row stays within its context to the end.

    Of layers with a sliding window no more than the window is read: a longer row would see what it must not.

    Raises:
        InvalidArgument: a token id is outside the vocabulary, or a row would be too long (SEQUENCE_TOO_LONG).
    """
    config = model.config
    longest = max(len(prompt) for prompt in request.prompts)
    length = len(request.shared_prefix) + longest + request.max_new_tokens
    limit = config.max_position_embeddings
    if getattr(config, "sliding_window", None) is not None:
        limit = min(limit, config.sliding_window)
    if length > limit:
        raise InvalidArgument(
            f"prefix, prompt and new tokens must fit the model's context of {limit} tokens, got {length}",
            reason=Reason.SEQUENCE_TOO_LONG,
        )
    for ids in (request.shared_prefix, *request.prompts):
        if ids and not (min(ids) >= 0 and max(ids) < config.vocab_size):
            wrong = next(token for token in ids if not 0 <= token < config.vocab_size)
            raise InvalidArgument(f"token ids must be in 0..{config.vocab_size - 1}, got {wrong}")


def compute_prefix(
    model: PreTrainedModel, ids: Sequence[int], prefill_tokens: int
) -> Generator[Events, None, Prefix]:
    """Keys and values of a prefix, in pieces of `prefill_tokens`; yields after each but the last, returns the whole."""
    cache = BatchCache(model.config.num_hidden_layers, len(ids))
    tokens = torch.tensor([list(ids)], device=model.device)
    for start in range(0, len(ids), prefill_tokens):
        end = min(start + prefill_tokens, len(ids))
        columns = torch.arange(start, end, device=model.device)
        one = Pass(tokens[:, start:end], columns[None], cache, head=None, lengths=(len(ids),))
        forward_together(model, [one])
        if end < len(ids):
            yield []
    return cache.keys_values()
