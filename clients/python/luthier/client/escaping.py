"""Text of others made safe to show: what would steer a terminal or turn writing around is written out.

Names, records, error messages and answers of models come from people and programs that the reader need not know.
"""

from __future__ import annotations

import re

# C0 and C1 controls but tab and newline, DEL, and the overrides and isolates of bidirectional writing.
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def escaped(text: str) -> str:
    r"""Return a text with steering characters written out, e.g. ESC as `\x1b`; tabs and newlines stay."""
    return _STEERING.sub(_written_out, text)


def escaped_line(text: str) -> str:
    r"""Return `escaped` text on one line: tabs and newlines are written out too, as `\t` and `\n`."""
    return escaped(text).replace("\t", r"\t").replace("\n", r"\n")


def escaped_json(text: str) -> str:
    r"""Return JSON with steering characters inside its strings written as JSON does, `\u009b`; it means the same."""
    return re.sub("[\x7f-\x9f\u202a-\u202e\u2066-\u2069]", lambda match: f"\\u{ord(match[0]):04x}", text)


def escaped_html(text: str) -> str:
    """Return `escaped` text for HTML, inside elements and attributes."""
    import html

    return html.escape(escaped(text))


def _written_out(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()
