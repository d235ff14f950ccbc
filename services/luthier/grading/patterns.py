"""Regular expressions of RE2: time linear in the text, memory bounded, whoever wrote them."""

from __future__ import annotations

from itertools import islice
from typing import Any

import re2

from luthier.errors import Reason
from luthier.grading.outcomes import GradingError

MAX_CHARACTERS = 1000
MAX_MATCHES = 1000
_MAX_MEMORY_BYTES = 1 << 20


class Pattern:
    """A regular expression that was read."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled

    @property
    def num_groups(self) -> int:
        """Groups that hold what they match."""
        return int(self._compiled.groups)

    def matches(self, text: str, *, whole: bool) -> bool:
        """Tell whether it is found in a text, or matches the whole of it."""
        search = self._compiled.fullmatch if whole else self._compiled.search
        return search(text) is not None

    def last_group(self, text: str) -> str | None:
        """Return what the group of the last match holds; None when there is no match, or the group took no part.

        Raises:
            GradingError: GRADER_INPUT_INVALID, there are more matches than are looked at.
        """
        found = list(islice(self._compiled.finditer(text), MAX_MATCHES + 1))
        if len(found) > MAX_MATCHES:
            raise GradingError(
                Reason.GRADER_INPUT_INVALID,
                f"pattern must match at most {MAX_MATCHES} times, it does more often",
            )
        group: str | None = found[-1].group(1) if found else None
        return group


def parsed(text: str) -> Pattern:
    """Read a regular expression.

    Raises:
        ValueError: it is none of RE2's, or too large; the message says why.
    """
    if not 0 < len(text) <= MAX_CHARACTERS:
        raise ValueError(f"must have 1 to {MAX_CHARACTERS} characters, got {len(text)}")
    options = re2.Options()
    options.max_mem = _MAX_MEMORY_BYTES
    options.log_errors = False
    try:
        return Pattern(re2.compile(text, options))
    except re2.error as error:
        detail = error.args[0] if error.args else ""
        shown = detail.decode(errors="replace") if isinstance(detail, bytes) else str(detail)
        raise ValueError(f"must be a regular expression of RE2: {shown}") from error
