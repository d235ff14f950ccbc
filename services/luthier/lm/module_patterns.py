"""Values for some of an adapter's modules, by pattern of their names, as PEFT has them.

To PEFT a pattern is an expression of Python that matches a module's whole name, or its end behind a dot. Here RE2
matches it, in time linear in the name, whoever wrote it; what only one of them reads, or reads otherwise, is refused.
"""

import re
from collections.abc import Sequence
from typing import Any, TypeVar

import re2

from luthier.errors import InvalidArgument, Reason

MAX_CHARACTERS = 200
_MAX_MEMORY_BYTES = 1 << 20
# Python takes the first for a set of letters and RE2 for a class, the second for a bound and RE2 for letters.
_READ_OTHERWISE = ("[:", "{,")

ValueT = TypeVar("ValueT")
Patterns = tuple[tuple[str, ValueT], ...]
"""Patterns and the value of each; of several that match a module the first counts."""


def check_pattern(text: str) -> None:
    """Return if a pattern is one that both PEFT and RE2 read, and alike.

    Raises:
        ValueError: it is not; the message says why.
    """
    _compiled(text)


def targeted(targets: Sequence[str], modules: Sequence[str]) -> tuple[str, ...]:
    """Return those of a model's linear layers that are named, whole or by an end behind a dot, sorted.

    Raises:
        InvalidArgument: a target names none of them, as the head's name does (MODULE_PATTERN_INVALID).
    """
    chosen: set[str] = set()
    for target in targets:
        matches = [name for name in modules if name == target or name.endswith("." + target)]
        if not matches:
            ends = sorted({name.rpartition(".")[2] for name in modules})
            whole = "; lm_head and embed_tokens are trained whole: trained_modules"
            raise InvalidArgument(
                f"target {target!r} matches no linear layer of the model; it has {ends}"
                + (whole if target in ("lm_head", "embed_tokens") else ""),
                reason=Reason.MODULE_PATTERN_INVALID,
                metadata={"target": target},
            )
        chosen.update(matches)
    return tuple(sorted(chosen))


def assigned(field: str, patterns: Patterns[ValueT], modules: Sequence[str]) -> dict[str, ValueT]:
    """Return the value of each of the modules that a pattern matches; `field` is what the patterns are called.

    Raises:
        InvalidArgument: a pattern cannot be read, or matches none of the modules (MODULE_PATTERN_INVALID).
    """
    found: dict[str, ValueT] = {}
    for text, value in patterns:
        matches = _matches(field, text, modules)
        if not matches:
            ends = sorted({module.rpartition(".")[2] for module in modules})
            raise _invalid(
                field,
                text,
                f"must match a module that the adapter changes, it matches none; they end in {ends}"
                + (f", the first is {modules[0]!r}" if modules else ""),
            )
        for module in matches:
            found.setdefault(module, value)
    return found


def require_one_value(field: str, patterns: Patterns[ValueT], modules: Sequence[str]) -> None:
    """Check that no two patterns say differently of one of the modules: who wrote them gave them no order.

    Raises:
        InvalidArgument: they do (MODULE_PATTERN_INVALID).
    """
    found: dict[str, tuple[str, ValueT]] = {}
    for text, value in patterns:
        for module in _matches(field, text, modules):
            other, before = found.setdefault(module, (text, value))
            if before != value:
                raise _invalid(
                    field,
                    text,
                    f"says {value} of {module}, of which {other!r} says {before}; one must not match it",
                )


def _matches(field: str, text: str, modules: Sequence[str]) -> list[str]:
    try:
        pattern = _compiled(text)
    except ValueError as error:
        raise _invalid(field, text, str(error)) from error
    return [module for module in modules if pattern.fullmatch(module)]


def _compiled(text: str) -> Any:
    if not 0 < len(text) <= MAX_CHARACTERS:
        raise ValueError(f"must have 1 to {MAX_CHARACTERS} characters, got {len(text)}")
    strange = next((part for part in _READ_OTHERWISE if part in text), None)
    if strange is not None:
        raise ValueError(f"must not hold {strange!r}, which expressions of Python and of RE2 read otherwise")
    # As PEFT puts it together (utils/other.py, get_pattern_key), for a match from end to end.
    whole = rf"(.*\.)?({text})"
    options = re2.Options()
    options.max_mem = _MAX_MEMORY_BYTES
    options.log_errors = False
    try:
        re.compile(whole + "$")
        return re2.compile(whole, options)
    except (re.error, re2.error) as error:
        detail = error.args[0] if error.args else ""
        shown = detail.decode(errors="replace") if isinstance(detail, bytes) else str(detail)
        raise ValueError(f"must be a regular expression of Python and of RE2: {shown}") from error


def _invalid(field: str, text: str, words: str) -> InvalidArgument:
    return InvalidArgument(
        f"the pattern {text!r} of {field} {words}",
        reason=Reason.MODULE_PATTERN_INVALID,
        metadata={"field": field, "pattern": text},
    )
