"""What a generation is asked for and what it says: requests, events, text by pieces. Imports no torch."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from luthier.errors import InvalidArgument

Decode = Callable[[Sequence[int]], str]
"""Turns token ids into text; a tokenizer's `decode`."""


class FinishReason(StrEnum):
    """Why a row ended."""

    STOP = "STOP"
    LENGTH = "LENGTH"
    CANCELLED = "CANCELLED"


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """Continue each of `prompts` (token ids after `shared_prefix`) by up to `max_new_tokens` tokens.

    `adapter` None is the base model. `temperature` 0 takes the most probable token; otherwise tokens are
    drawn from the smallest set whose probability reaches `top_p`. Row i draws from a generator of its own,
    keyed by (`seed`, `first_row` + i): cutting a batch differently, with `first_row` to say where a part
    begins, changes no row's random numbers. A row ends at any of `stop_token_ids`, which is not part of its
    answer.

    `num_samples` continues each prompt so many times, reading it once: sample j of prompt i is row
    i * `num_samples` + j. `want_logprobs` is for whoever trains on what was drawn: each token comes with its
    log-probability under the distribution that it was drawn from, the token that stops a row is one of them, and
    logits are those of `readouts.TokenLogprobs`, not rounded to the model's type.

    Raises:
        InvalidArgument: no prompt, an empty prompt, a number outside its range, or log-probabilities of tokens that
            are not drawn from all of the distribution.
    """

    request_id: str
    prompts: tuple[tuple[int, ...], ...]
    max_new_tokens: int
    adapter: str | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    first_row: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    shared_prefix: tuple[int, ...] = ()
    num_samples: int = 1
    want_logprobs: bool = False

    def __post_init__(self) -> None:
        if not self.prompts or not all(self.prompts):
            raise InvalidArgument(
                f"a request needs at least one prompt and every prompt a token, "
                f"got lengths {[len(prompt) for prompt in self.prompts]}"
            )
        if self.max_new_tokens < 1:
            raise InvalidArgument(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InvalidArgument(f"temperature must be finite and at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise InvalidArgument(f"top_p must be in (0, 1], got {self.top_p}")
        if self.num_samples < 1:
            raise InvalidArgument(f"num_samples must be at least 1, got {self.num_samples}")
        if self.want_logprobs and not (self.temperature > 0 and self.top_p == 1):
            raise InvalidArgument(
                "tokens whose log-probabilities are wanted must be drawn with a temperature above 0 and top_p 1, got "
                f"temperature {self.temperature} and top_p {self.top_p}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationEvent:
    """What one row of a request produced in a step.

    `token_ids` and `text` are what is new (text may lag behind tokens by a part of a character, and is empty
    without a decoder); `finish_reason` is set on the last event of the row, `num_generated` counts the row's
    tokens so far. `logprobs` are those of `token_ids` where the request wants them.
    """

    request_id: str
    row: int
    token_ids: tuple[int, ...]
    text: str
    num_generated: int
    finish_reason: FinishReason | None = None
    logprobs: tuple[float, ...] = ()


class TextAssembler:
    """Turns a growing list of tokens into pieces of text that add up to the text of the whole.

    A piece never ends within a character: while the newest tokens decode to the replacement character
    U+FFFD, they wait for the next. Decoding starts a few tokens back, because some tokenizers drop a leading
    space.
    """

    __slots__ = ("_decode", "_ids", "_read", "_start")

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._start = 0
        self._read = 0

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that became certain with it, often one word, perhaps nothing."""
        self._ids.append(token_id)
        known, whole = self._texts()
        if len(whole) <= len(known) or whole.endswith("\ufffd"):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return whole[len(known) :]

    def finish(self) -> str:
        """The text still held back: an unfinished character comes out as U+FFFD."""
        known, whole = self._texts()
        self._start = self._read = len(self._ids)
        return whole[len(known) :]

    def _texts(self) -> tuple[str, str]:
        return self._decode(self._ids[self._start : self._read]), self._decode(self._ids[self._start :])
