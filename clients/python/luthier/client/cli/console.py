"""The console and the tables of the command line: text cannot steer the terminal, whoever wrote it."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.style import StyleType
from rich.table import Table
from rich.text import Span, Text

from luthier.client.escaping import escaped


class EscapingConsole(Console):
    """A console that writes out what would steer the terminal; styles and animations work as ever."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Draw something. All that rich draws comes through here piece by piece."""
        shown = _escaped_text(renderable) if isinstance(renderable, Text) else renderable
        for segment in super().render(shown, options):
            yield segment if segment.control else Segment(escaped(segment.text), segment.style)

    def render_str(self, text: str, **options: Any) -> Text:
        """Make a text of a string, as rich does for cells and headers, before it is measured."""
        return super().render_str(escaped(text), **options)


class EscapingTable(Table):
    """A table whose cells are as wide as what is shown of them."""

    def add_row(
        self, *renderables: RenderableType | None, style: StyleType | None = None, end_section: bool = False
    ) -> None:
        """Add a row; a text in it is written out before it is measured."""
        cells = (_escaped_text(one) if isinstance(one, Text) else one for one in renderables)
        super().add_row(*cells, style=style, end_section=end_section)


def _escaped_text(text: Text) -> Text:
    if escaped(text.plain) == text.plain:
        return text
    pieces = [escaped(character) for character in text.plain]
    at = [0, *accumulate(map(len, pieces))]
    made = text.blank_copy("".join(pieces))
    made.spans = [Span(at[span.start], at[min(span.end, len(pieces))], span.style) for span in text.spans]
    return made
