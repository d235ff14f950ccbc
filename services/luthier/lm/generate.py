"""What a generation is asked for and what it says: requests, events, the choice of a token, text by pieces.

Shape suffixes: B rows, V vocabulary.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from luthier.errors import FailedPrecondition, InvalidArgument, Reason

_DRAWN_BYTES = 256 << 20
# Of a log-probability and its exponential in float32.
_BYTES_OF_LOGIT = 8
_BLOCK_WORDS = 256
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


def row_generator(seed: int, row: int) -> torch.Generator:
    """The random numbers of one row, the same on every machine."""
    digest = hashlib.sha256(f"{seed}/{row}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def output_not_finite(where: str) -> FailedPrecondition:
    """Return the error of logits that are no finite numbers: every choice among them would be made up."""
    return FailedPrecondition(
        f"the model's logits must be finite numbers, those of {where} are not; its weights or its adapter are broken",
        reason=Reason.OUTPUT_NOT_FINITE,
    )


def draw(logits_V: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Draw a token from the nucleus of the distribution (arXiv:1904.09751); temperature > 0.

    Raises:
        FailedPrecondition: the logits are not numbers (reason OUTPUT_NOT_FINITE).
    """
    wide_V = logits_V.double().cpu()
    if not bool(wide_V.isfinite().all()):
        raise output_not_finite("a row to draw from")
    # Relative to the greatest, so that the smallest temperature overflows to minus infinity alone.
    probabilities = ((wide_V - wide_V.max()) / temperature).softmax(dim=0)
    ordered, order = probabilities.sort(descending=True, stable=True)
    # A token belongs to the nucleus when those before it do not reach top_p: the first always does.
    before = ordered.cumsum(dim=0) - ordered
    ordered[before >= top_p] = 0.0
    return int(order[torch.multinomial(ordered, 1, generator=generator)])


def draw_rows(
    logits_BV: Tensor, generators: Sequence[torch.Generator | None]
) -> tuple[list[int], list[float]]:
    """Draw a token for each row from all of its distribution; returns them and their log-probabilities.

    A row takes one number from its generator; one without a generator takes its first token of any probability.
    Logits are finite, and divided by the temperature already. Takes some rows at a time, for their memory.
    """
    tokens: list[int] = []
    logprobs: list[float] = []
    size = max(1, _DRAWN_BYTES // (_BYTES_OF_LOGIT * logits_BV.shape[1]))
    for start in range(0, len(generators), size):
        drawn = _draw_part(logits_BV[start : start + size], generators[start : start + size])
        tokens += drawn[0]
        logprobs += drawn[1]
    return tokens, logprobs


def _draw_part(
    logits_BV: Tensor, generators: Sequence[torch.Generator | None]
) -> tuple[list[int], list[float]]:
    logprobs_BV = logits_BV.log_softmax(dim=-1)
    numbers = [
        0.0 if one is None else float(torch.rand(1, generator=one, dtype=torch.float64)) for one in generators
    ]
    shares_B = torch.tensor(numbers, dtype=torch.float64, device=logits_BV.device)
    tokens_B1 = _tokens_at(logprobs_BV.exp(), shares_B[:, None])
    return tokens_B1.squeeze(1).tolist(), logprobs_BV.gather(1, tokens_B1).squeeze(1).tolist()


def _tokens_at(probabilities_BV: Tensor, shares_B1: Tensor) -> Tensor:
    """Return the token [B, 1] of each row at which the sum of probabilities passes a share of their whole.

    First the block of words is found and then the word in it: float64, in which small probabilities at the end of a
    large vocabulary are not lost, is needed of a few sums alone.
    """
    width = probabilities_BV.shape[1]
    num_blocks = width // _BLOCK_WORDS
    whole = num_blocks * _BLOCK_WORDS
    blocks_BNW = probabilities_BV[:, :whole].reshape(len(probabilities_BV), num_blocks, _BLOCK_WORDS)
    rest_B1 = probabilities_BV[:, whole:].sum(dim=1, keepdim=True)
    masses_BN = torch.cat([blocks_BNW.sum(dim=2), rest_B1], dim=1).double()
    reached_BN = _running_sums(masses_BN)
    sought_B1 = shares_B1 * reached_BN[:, -1:]
    block_B1 = _first_above(reached_BN, sought_B1)
    mass_B1 = masses_BN.gather(1, block_B1)
    left_B1 = sought_B1 - (reached_BN.gather(1, block_B1) - mass_B1)
    words_BW = block_B1 * _BLOCK_WORDS + torch.arange(_BLOCK_WORDS, device=block_B1.device)
    found_BW = probabilities_BV.gather(1, words_BW.clamp(max=width - 1)).double()
    reached_BW = _running_sums(found_BW.masked_fill(words_BW >= width, 0.0))
    # Of the block's own sum, which rounding makes another one: a share of it is always reached.
    share_B1 = (left_B1 / mass_B1).nan_to_num().clamp(0.0, 1.0)
    place_B1 = _first_above(reached_BW, share_B1 * reached_BW[:, -1:])
    return (block_B1 * _BLOCK_WORDS + place_B1).clamp(max=width - 1)


def _running_sums(values_BN: Tensor) -> Tensor:
    """Return the sums of each row up to each place; those of a GPU are formed by the processor, in its one order.

    A GPU's depend on how its blocks run, and torch refuses to form them where determinism is demanded.
    """
    return values_BN.cpu().cumsum(dim=1).to(values_BN.device)


def _first_above(rising_BN: Tensor, sought_B1: Tensor) -> Tensor:
    """Return the first place of each row that is above: rounding may leave what is sought at the very end."""
    return torch.searchsorted(rising_BN, sought_B1, right=True).clamp(max=rising_BN.shape[1] - 1)
