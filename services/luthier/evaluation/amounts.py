"""Amounts of scores: in words, shares in percentage points and others as they are, and whether one matters."""

from __future__ import annotations


def amount(value: float, *, is_share: bool, signed: bool = False) -> str:
    """Return an amount of a score, e.g. `+2.0 pp` of a share."""
    sign = "+" if signed else ""
    return f"{100 * value:{sign}.1f} pp" if is_share else f"{value:{sign}.4g}"


def spread(lower: float, upper: float, *, is_share: bool) -> str:
    """Return an interval of differences, e.g. `[-1.0, +3.2]`."""
    scale, form = (100, "+.1f") if is_share else (1, "+.4g")
    return f"[{scale * lower:{form}}, {scale * upper:{form}}]"


def reached(value: float, *, is_share: bool) -> str:
    """Return a score, e.g. `91.7 %` of a share."""
    return f"{100 * value:.1f} %" if is_share else f"{value:.4g}"


def is_alike(lower: float, upper: float, smallest: float) -> bool:
    """Whether an interval shows that two arms differ by less than `smallest`; 0: every difference matters."""
    return smallest > 0 and -smallest < lower and upper < smallest
