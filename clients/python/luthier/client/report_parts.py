"""Pieces of an HTML report: sections and tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from luthier.client.escaping import escaped_html


def section(title: str, body: str) -> str:
    """Return a section of HTML; nothing where there is no body."""
    return f"<section><h2>{escaped_html(title)}</h2>{body}</section>\n" if body else ""


def facts_table(pairs: Iterable[tuple[str, str]]) -> str:
    """Return labels and values, those without a value left out."""
    rows = "".join(
        f'<tr><th scope="row">{escaped_html(label)}</th><td><code>{escaped_html(value)}</code></td></tr>'
        for label, value in pairs
        if value
    )
    return f'<table class="facts">{rows}</table>'


def scrolled(title: str, body: str) -> str:
    """Return HTML that is moved sideways, by keys as well, where a window is too narrow; `title` says what it is."""
    return f'<div class="wide" role="group" tabindex="0" aria-label="{escaped_html(title)}">{body}</div>'


def table(
    title: str, head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers_from: int | None = None
) -> str:
    """Return a table of cells that are HTML already; columns from `numbers_from` on stand to the right.

    `title` is what who does not see the page is told of it.
    """

    def kind(column: int) -> str:
        return ' class="number"' if numbers_from is not None and column >= numbers_from else ""

    top = "".join(
        f'<th scope="col"{kind(column)}>{escaped_html(name)}</th>' for column, name in enumerate(head)
    )
    body = "".join(
        "<tr>" + "".join(f"<td{kind(column)}>{cell}</td>" for column, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    return scrolled(title, f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>")


def estimate_cell(text: str) -> str:
    """Return `value [lower, upper]`, the interval small; the value alone where there is none."""
    value, bracket, bounds = text.partition(" [")
    return escaped_html(value) + (f" <small>[{escaped_html(bounds)}</small>" if bracket else "")
