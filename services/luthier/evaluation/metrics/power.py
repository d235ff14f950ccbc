"""How small a difference a comparison can find with the records that it has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, stdev

_CONFIDENCE = 0.95


def minimum_detectable_difference(differences: Sequence[float], *, power: float = 0.8) -> float:
    """Return the true mean difference that as many pairs with the same spread would show with probability `power`.

    Shown means that the two-sided 95 % interval of the mean leaves out zero. Normal approximation:
    (z(0.975) + z(power)) * standard deviation / sqrt(number of pairs). The unit is that of the differences. It is 0
    when all differences are the same: their spread is then unknown rather than small.

    Args:
        differences: candidate minus baseline by record.
        power: probability to find the difference, in (0, 1).

    Raises:
        ValueError: there are fewer than two pairs, or power is out of range.
    """
    if len(differences) < 2:
        raise ValueError(f"there must be at least 2 pairs, got {len(differences)}")
    if not 0 < power < 1:
        raise ValueError(f"power must be in (0, 1), got {power}")
    normal = NormalDist()
    quantiles = normal.inv_cdf((1 + _CONFIDENCE) / 2) + normal.inv_cdf(power)
    return quantiles * stdev(differences) / math.sqrt(len(differences))
