"""Amounts of money, periods and guidance, and the ways in which news write them.

Money is exact (`Decimal`); revenue is in millions of the currency, earnings per share in its unit.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

Currency = Literal["USD", "EUR", "GBP", "JPY"]
Guidance = Literal["raised", "lowered", "maintained"]

SYMBOLS: Mapping[Currency, tuple[str, ...]] = {
    "USD": ("$", "US$"),
    "EUR": ("€",),
    "GBP": ("£",),
    "JPY": ("¥",),
}
"""Signs written before the number."""

WORDS: Mapping[Currency, str] = {"USD": "dollars", "EUR": "euros", "GBP": "pounds", "JPY": "yen"}
"""Words written after the number."""

VERBS: Mapping[Guidance, tuple[str, ...]] = {
    "raised": ("raised", "lifted", "increased"),
    "lowered": ("lowered", "cut", "reduced", "trimmed"),
    "maintained": ("maintained", "confirmed", "reaffirmed", "reiterated"),
}
"""Verbs of each guidance; past tense and participle are the same word."""

QUARTERS = ("first", "second", "third", "fourth")
YEARS = range(2018, 2027)
_SHARE_OF_FULL_YEARS = 0.15
_SHARE_OF_SMALL = 0.4
_SHARE_OF_LONG_MILLIONS = 0.15


@dataclass(frozen=True, slots=True, kw_only=True)
class MoneyStyle:
    """How one text writes money: a sign, a code or a word, and the scale in full or short."""

    before: str
    after: str
    billion: str
    million: str
    in_billions: bool

    def per_share(self, amount: Decimal) -> str:
        """Return an amount without a scale, e.g. `$1.40` or `1.40 dollars`."""
        return f"{self.before}{amount:,}{self.after}"

    def revenue(self, millions: Decimal) -> str:
        """Return an amount with its scale, e.g. `EUR 4.25 billion` or `812.5 million euros`."""
        if self.in_billions and millions >= 1000:
            return f"{self.before}{_plain(millions / 1000):,}{self.billion}{self.after}"
        return f"{self.before}{_plain(millions):,}{self.million}{self.after}"


def draw_style(source: random.Random, currency: Currency) -> MoneyStyle:
    """Return a way to write money of a currency."""
    before, after = source.choice(
        (
            (source.choice(SYMBOLS[currency]), ""),
            (source.choice(SYMBOLS[currency]), ""),
            (f"{currency} ", ""),
            ("", f" {WORDS[currency]}"),
        )
    )
    billion, million = source.choice(((" billion", " million"), (" billion", " million"), ("bn", "m")))
    in_billions = source.random() >= _SHARE_OF_LONG_MILLIONS
    return MoneyStyle(before=before, after=after, billion=billion, million=million, in_billions=in_billions)


def draw_revenue(source: random.Random, currency: Currency) -> Decimal:
    """Return a revenue in millions: tens of millions to tens of billions, more in yen."""
    if currency == "JPY":
        return Decimal(100 * source.randint(50, 9000))
    if source.random() < _SHARE_OF_SMALL:
        return Decimal(source.randint(200, 9999)) / 10
    return Decimal(source.choice((100 * source.randint(11, 480), 10 * source.randint(101, 1980))))


def draw_eps(source: random.Random, currency: Currency) -> Decimal:
    """Return earnings per share with two decimals, in yen with one."""
    if currency == "JPY":
        return Decimal(source.randint(105, 2400)).scaleb(-1)
    return Decimal(source.randint(11, 790)).scaleb(-2)


def near_revenue(source: random.Random, millions: Decimal, *, low: float, high: float) -> Decimal:
    """Return another revenue, `low` to `high` times as large and as finely written."""
    if millions < 1000:
        return _near(source, millions, Decimal("0.1"), low, high)
    return _near(source, millions, Decimal(100 if millions % 100 == 0 else 10), low, high)


def near_eps(source: random.Random, eps: Decimal) -> Decimal:
    """Return other earnings per share, at most 15 % away and as finely written."""
    return _near(source, eps, Decimal(1).scaleb(int(eps.as_tuple().exponent)), 0.85, 1.15)


def _near(source: random.Random, amount: Decimal, step: Decimal, low: float, high: float) -> Decimal:
    other = amount
    while other == amount:
        other = (amount * Decimal(source.uniform(low, high)) / step).to_integral_value() * step
    return other


def draw_period(source: random.Random) -> tuple[str, str]:
    """Return a period in normal form and as news write it: `Q3 2025`, `the third quarter of 2025`."""
    year = source.choice(YEARS)
    if source.random() < _SHARE_OF_FULL_YEARS:
        written = source.choice(
            (f"fiscal {year}", f"FY {year}", f"fiscal year {year}", f"the full year {year}")
        )
        return f"FY {year}", written
    quarter = source.randint(1, 4)
    ordinal = QUARTERS[quarter - 1]
    forms = (
        f"Q{quarter} {year}",
        f"Q{quarter} of {year}",
        f"the {ordinal} quarter of {year}",
        f"the {ordinal} quarter of {year}",
        f"the {year} {ordinal} quarter",
    )
    return f"Q{quarter} {year}", source.choice(forms)


def _plain(number: Decimal) -> Decimal:
    """Drop trailing zeros but never go over to an exponent: 4200, 812.5."""
    return number.to_integral_value() if number == number.to_integral_value() else number.normalize()
