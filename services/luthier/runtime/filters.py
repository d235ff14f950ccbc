r"""`filter` and `order_by` of list calls: the part of AIP-160 and AIP-132 that we have, and nothing silently more.

filter   = [ term { "AND" term } ]       term = field "=" value
field    = name { "." name }             value = '"' any text, \\" and \\\\ escaped '"' | word
"""

import re
from collections.abc import Collection, Mapping

from luthier.errors import FieldViolation, InvalidArgument, Reason

_LABEL = re.compile(r"labels\.[a-z][a-z0-9_-]{0,62}")
_TOKEN = re.compile(r'\s*(?:(?P<quoted>"(?:[^"\\]|\\.)*")|(?P<word>[\w.:/-]+)|(?P<equals>=))')


def parse_filter(text: str, allowed: Collection[str]) -> Mapping[str, str]:
    """Return the value that each field must equal: `state = "READY" AND labels.team = red`.

    `allowed` names the fields, among them `labels` where any `labels.<key>` may be used. Raises InvalidArgument
    FILTER_INVALID that says what is wrong where, also for OR, NOT, other operators and a field used twice.
    """
    tokens = _tokens(text)
    wanted: dict[str, str] = {}
    position = 0
    while position < len(tokens):
        if position:
            if tokens[position] != ("word", "AND"):
                raise _invalid(f"terms must be joined by AND, got {tokens[position][1]!r}")
            position += 1
        term = tokens[position : position + 3]
        kinds = tuple(kind for kind, _ in term)
        if len(term) < 3 or kinds[0] != "word" or kinds[1] != "equals" or kinds[2] == "equals":
            shown = " ".join(value for _, value in term)
            raise _invalid(f"a term must be `field = value`, got {shown!r}")
        field, value = term[0][1], term[2][1]
        if not _is_allowed(field, allowed):
            names = ", ".join("labels.<key>" if name == "labels" else name for name in sorted(allowed))
            raise _invalid(f"the field must be one of {names}, got {field!r}")
        if field in wanted:
            raise _invalid(f"a field must be used once, got {field!r} twice")
        wanted[field] = value
        position += 3
    return wanted


def parse_order_by(text: str) -> bool:
    """Return whether the newest come first: they do by default and for `create_time desc`.

    Raises InvalidArgument ORDER_BY_INVALID for anything but that, `create_time` and `create_time asc`.
    """
    order = " ".join(text.split())
    if order in ("", "create_time desc"):
        return True
    if order in ("create_time", "create_time asc"):
        return False
    raise InvalidArgument.of_fields(
        FieldViolation(
            field="order_by",
            description=f"must be `create_time desc`, `create_time` or empty, got {text!r}",
            reason=Reason.ORDER_BY_INVALID,
        )
    )


def _is_allowed(field: str, allowed: Collection[str]) -> bool:
    if field.startswith("labels."):
        return "labels" in allowed and _LABEL.fullmatch(field) is not None
    return field in allowed and field != "labels"


def _tokens(text: str) -> list[tuple[str, str]]:
    tokens: list[tuple[str, str]] = []
    rest = text.rstrip()
    position = 0
    while position < len(rest):
        match = _TOKEN.match(rest, position)
        if match is None:
            raise _invalid(f"cannot read {rest[position:].lstrip()[:40]!r} at character {position + 1}")
        kind = str(match.lastgroup)
        value = match[kind]
        if kind == "quoted":
            value = re.sub(r"\\(.)", r"\1", value[1:-1])
        tokens.append((kind, value))
        position = match.end()
    if tokens and tokens[-1] == ("word", "AND"):
        raise _invalid("a term must follow the last AND")
    return tokens


def _invalid(description: str) -> InvalidArgument:
    return InvalidArgument.of_fields(
        FieldViolation(field="filter", description=description, reason=Reason.FILTER_INVALID)
    )
