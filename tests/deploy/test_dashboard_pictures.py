"""The pictures in the docs show the dashboards as they are: a panel that came later has one too."""

from __future__ import annotations

import xml.etree.ElementTree as Xml
from pathlib import Path

import pytest
from deploy.grafana.builder import Dashboard
from deploy.grafana.dashboards import DASHBOARDS

PICTURES = Path(__file__).parents[2] / "docs" / "dashboards"


@pytest.mark.parametrize("board", DASHBOARDS, ids=lambda board: board.uid)
def test_a_picture_has_every_row_and_panel_of_its_dashboard(board: Dashboard) -> None:
    drawn = Xml.parse(PICTURES / f"{board.uid}.svg")
    words = {one.text for one in drawn.iter("{http://www.w3.org/2000/svg}text")}
    titles = [board.title, *(row.title for row in board.rows), *(panel.title for panel in board.panels)]
    missing = [title for title in titles if title not in words]
    assert not missing, (
        f"draw docs/dashboards/{board.uid}.svg anew: python -m tests.e2e.monitored docs/dashboards"
    )


def test_every_picture_is_of_a_dashboard() -> None:
    assert {path.stem for path in PICTURES.glob("*.svg")} == {board.uid for board in DASHBOARDS}
