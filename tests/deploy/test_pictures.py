"""Pictures of dashboards show what was answered, and nothing that was not."""

from __future__ import annotations

import re
import xml.etree.ElementTree as Xml
from collections.abc import Sequence

from deploy.grafana.builder import Dashboard, Panel, Query, Row
from deploy.pictures import Line, Times, draw, shown

TIMES = Times(first=100.0, last=200.0, step=10.0)
Places = list[tuple[float, float]]


def drawn(lines: Sequence[Line], *, stacked: bool = False, width: int = 24) -> tuple[list[Places], list[str]]:
    """The pieces of lines that a panel is drawn with, and the words around them."""
    panel = Panel(title="t", queries=(Query(expr="x"),), width=width, stacked=stacked)
    board = Dashboard(uid="b", title="Board", rows=(Row(title="r", panels=(panel,)),))
    picture = Xml.fromstring(draw(board, {"t": lines}, TIMES, "note"))
    pieces = []
    for one in picture.iter("{http://www.w3.org/2000/svg}polyline"):
        numbers = map(float, re.split("[ ,]", one.attrib["points"]))
        pieces.append(list(zip(numbers, numbers, strict=True)))
    return pieces, [one.text or "" for one in picture.iter("{http://www.w3.org/2000/svg}text")]


def line(name: str, *values: float, first: float = 100.0) -> Line:
    return Line(name=name, points=[(first + 10 * number, value) for number, value in enumerate(values)])


def test_a_line_is_broken_where_nothing_was_answered() -> None:
    points = [(100.0, 1.0), (110.0, 1.0), (150.0, 2.0), (160.0, 2.0)]
    pieces, _ = drawn([Line(name="a", points=points)])
    assert [len(piece) for piece in pieces] == [2, 2]


def test_all_panels_show_the_same_time() -> None:
    ((early, late),), words = drawn([line("a", 1.0, 1.0, first=150.0)])
    assert early[0] == 58 + 0.5 * (24 * 46 - 70)
    assert late[0] > early[0]
    assert {"0 s", "50 s", "100 s"} <= set(words)


def test_lines_that_add_up_stand_on_one_another() -> None:
    lines = [line("a", 1.0, 1.0), line("b", 1.0, 3.0)]
    (below, above), words = drawn(lines, stacked=True)
    assert "4" in words, "the scale goes to the sum"
    assert [place[1] for place in above] < [place[1] for place in below]
    (first, second), _ = drawn(lines)
    assert first[0] == second[0], "otherwise equal values are one place"


def test_values_are_read_as_people_write_them() -> None:
    said = [
        shown(value, unit) for value, unit in ((1010 * 1024, "bytes"), (1024, "bytes"), (0.5, "percentunit"))
    ]
    assert said == ["1010 kB", "1 kB", "50 %"]
    assert [shown(value, "short") for value in (12, 1234, 999_900)] == ["12", "1.23 k", "1000 k"]


def test_the_largest_are_drawn_and_each_of_them_is_named() -> None:
    lines = [line(f"series {number}", float(number), float(number)) for number in range(30)]
    pieces, words = drawn(lines)
    assert len(pieces) == 8
    assert {f"series {number}" for number in range(22, 30)} | {"and 22 more"} <= set(words)
    assert "series 21" not in words


def test_no_line_is_drawn_that_a_narrow_panel_cannot_name() -> None:
    lines = [line(f"a long name of a series {number}", float(number), float(number)) for number in range(30)]
    pieces, words = drawn(lines, width=4)
    assert len(pieces) == sum(word.startswith("a long name") for word in words) == 4
    assert "and 26 more" in words
