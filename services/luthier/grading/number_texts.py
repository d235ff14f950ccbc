"""Numbers in texts: 1234.5, 1,234.5, -7, 1.5e3; exact, as decimals."""

from __future__ import annotations

import re
from decimal import Context, Decimal, InvalidOperation, localcontext

_MAX_CHARACTERS = 400
_MAX_EXPONENT = 10_000
# No alternative is tried twice at a place (possessive): the time is linear. A sign belongs to a number unless a letter,
# a digit or a closing bracket stands before it, as in 3-4.
_NUMBER = re.compile(
    r"(?:(?<![\w.)\]])[-+\u2212])?+(?:[0-9]++(?:,[0-9]++)*+(?:\.[0-9]++)?+|(?<![\w.])\.[0-9]++)(?:[eE][-+]?+[0-9]++)?+"
)
_GROUPED = re.compile(r"[0-9]{1,3}(?:,[0-9]{3})++(?![0-9,])")
_CONTEXT = Context(prec=60, Emax=4 * _MAX_EXPONENT, Emin=-4 * _MAX_EXPONENT)


def number_of(text: str) -> Decimal | None:
    """Return the number that a text is, white space at both ends aside; None when it is none."""
    stripped = text.strip()
    found = _NUMBER.fullmatch(stripped)
    if found is None:
        return None
    pieces = _pieces(found[0])
    return pieces[0] if len(pieces) == 1 else None


def last_number(text: str) -> Decimal | None:
    """Return the last number in a text; None when there is none.

    A comma between digits groups thousands (1,234) where it can, and separates numbers (1,2) where it cannot.
    """
    last = None
    for found in _NUMBER.finditer(text):
        last = found
    if last is None:
        return None
    pieces = _pieces(last[0])
    return pieces[-1] if pieces else None


def is_close(found: Decimal, right: Decimal, absolute: float, relative: float) -> bool:
    """Tell whether two numbers differ by no more than the greater tolerance; `relative` is a share of `right`."""
    if found == right:
        return True
    with localcontext(_CONTEXT):
        distance = abs(found - right)
        return distance <= max(Decimal(absolute), Decimal(relative) * abs(right))


def _pieces(token: str) -> list[Decimal]:
    """Return the numbers of a token: one, or several between commas that group no thousands."""
    plain = token.replace("\u2212", "-")
    unsigned = plain.lstrip("+-")
    separates = "," in unsigned and _GROUPED.match(unsigned) is None
    texts = plain.split(",") if separates else [plain.replace(",", "")]
    numbers = [_decimal(text) for text in texts]
    return [number for number in numbers if number is not None]


def _decimal(text: str) -> Decimal | None:
    if len(text) > _MAX_CHARACTERS:
        return None
    try:
        number = Decimal(text)
    except InvalidOperation:
        return None
    return number if number.is_finite() and abs(number.adjusted()) <= _MAX_EXPONENT else None
