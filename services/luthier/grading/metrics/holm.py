"""Many comparisons at once, with the confidence at which each interval says what its verdict says.

Source of `corrected`: S. Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Stat. 1979. It
decides which differences are there. How large they are it does not tell together: the intervals of its steps say of
zero what their p-values say, and hold the truth each at its own confidence (bounds that hold together and agree with
Holm end at zero: K. Strassburger and F. Bretz, "Compatible simultaneous lower confidence bounds for the Holm
procedure", Stat. Med. 2008). Where sizes are held against a limit it has to be `shared`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ALPHA = 0.05
"""The alpha of all families."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Corrected:
    """A p-value that may be held against alpha as it is, and the confidence of the interval that agrees with it."""

    p_value: float
    confidence: float


def shared(p_values: Sequence[float]) -> list[Corrected]:
    """Return each p-value corrected for as many as there are, and the confidence at which all intervals hold together.

    For statements about sizes of which any one is enough (C. Bonferroni, 1936): at most alpha of such families have an
    interval without its truth.
    """
    count = len(p_values)
    return [Corrected(p_value=min(1.0, count * one), confidence=1 - ALPHA / count) for one in p_values]


def corrected(p_values: Sequence[float]) -> list[Corrected]:
    """Return each p-value corrected for all of them.

    At most alpha of such families call anything different that is not. An interval of the given confidence leaves zero
    out exactly where the corrected p-value is at most alpha, if it and the p-value are of one test. Several of these
    intervals need not hold their truths together.
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    found: dict[int, Corrected] = {}
    highest, open_factor = 0.0, 0
    for rank, index in enumerate(order):
        factor = len(p_values) - rank
        highest = min(1.0, max(highest, factor * p_values[index]))
        if highest > ALPHA and not open_factor:
            # All that are not called different share the level of the first of them.
            open_factor = factor
        level = ALPHA / (open_factor or factor)
        found[index] = Corrected(p_value=highest, confidence=1 - level)
    return [found[index] for index in range(len(p_values))]
