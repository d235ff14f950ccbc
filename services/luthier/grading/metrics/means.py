"""How sure the score of one arm is: the tests of `paired`, held against nothing.

One method for each kind of score, so that an arm's interval and those of its differences cannot contradict each other:
shares as `paired_share`, numbers by Student, ratios of sums by Student over the jackknife. Right or wrong has `wilson`.

Numbers that do not scatter, or of which there is one, do not tell how sure their mean is. Their bounds are the value
itself, which says that nobody knows them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from luthier.grading.metrics.intervals import MAX_MEAN_NLL, Interval, perplexity_of
from luthier.grading.metrics.paired import rate_difference, real_difference, share_difference

CONFIDENCE = 0.95


def share_mean(shares: Sequence[float]) -> Interval:
    """Return the mean of shares from 0 to 1 with its 95 % interval, which allows for a 0 or a 1 that was not seen.

    Raises:
        ValueError: there is no share, or one lies elsewhere.
    """
    # The share of the points that it has less what it has not: from -1 to 1, as differences are.
    found = share_difference(shares, [1 - share for share in shares]).interval(CONFIDENCE)
    value, lower, upper = math.fsum(shares) / len(shares), (found.lower + 1) / 2, (found.upper + 1) / 2
    return Interval(value=value, lower=min(value, lower), upper=max(value, upper), count=found.count)


def real_mean(values: Sequence[float]) -> Interval:
    """Return the mean of numbers with its 95 % interval.

    Raises:
        ValueError: there is no number, or one is not finite.
    """
    return real_difference(values, [0.0] * len(values)).interval(CONFIDENCE).told()


def rate_mean(amounts: Sequence[float], sizes: Sequence[float]) -> Interval:
    """Return the sum of amounts, none below 0, / the sum of sizes with its 95 % interval over records.

    Raises:
        ValueError: there is no record, an amount is not finite, or a size is not above 0.
    """
    found = rate_difference(amounts, [0.0] * len(amounts), sizes).interval(CONFIDENCE).told()
    return Interval(value=found.value, lower=max(0.0, found.lower), upper=found.upper, count=found.count)


def perplexity(nll: Sequence[float], num_tokens: Sequence[int]) -> Interval:
    """Return exp(sum of nll / sum of tokens) with its 95 % interval over records; nll in nats by record.

    The interval is the one of the nats a token, so that it holds no perplexity below 1.

    Raises:
        ValueError: as `rate_mean`, or the perplexity is beyond the range of float64.
    """
    found = rate_mean(nll, [float(count) for count in num_tokens])
    value = float(perplexity_of(found.value, 1.0))
    if found.upper > MAX_MEAN_NLL:
        return Interval(value=value, lower=value, upper=value, count=found.count)
    lower, upper = math.exp(found.lower), math.exp(found.upper)
    return Interval(value=value, lower=lower, upper=upper, count=found.count)
