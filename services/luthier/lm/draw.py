"""The choice of a token: draws from a distribution, each row with random numbers of its own.

Shape suffixes: B rows, V vocabulary.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from luthier.errors import FailedPrecondition, Reason

_DRAWN_BYTES = 256 << 20
# Of a log-probability and its exponential in float32.
_BYTES_OF_LOGIT = 8
_BLOCK_WORDS = 256


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
