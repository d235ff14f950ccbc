"""Every panel of every dashboard shows something of a real run."""

from __future__ import annotations

import xml.etree.ElementTree as Xml
from pathlib import Path

import pytest
from deploy.grafana.dashboards import DASHBOARDS
from tests.e2e.monitored import draw_all, monitored

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.long]


def test_every_panel_returns_data(tmp_path: Path) -> None:
    seen = monitored(tmp_path / "home")
    draw_all(seen, tmp_path / "pictures")
    empty = [
        f"{board.title}: {panel.title}"
        for board in DASHBOARDS
        for panel in board.panels
        if not any(line.points for line in seen.panels[board.uid][panel.title])
    ]
    assert empty == []
    for board in DASHBOARDS:
        picture = (tmp_path / "pictures" / f"{board.uid}.svg").read_text()
        Xml.fromstring(picture)
        assert "no data" not in picture

    overview = seen.panels["luthier-overview"]
    lost = [
        line for line in overview["Attempts that did not succeed"] if any(value for _, value in line.points)
    ]
    assert {"TRAIN lost WORKER_LOST", "TRAIN failed NO_REWARD_SPREAD"} <= {line.name for line in lost}
    run = seen.panels["luthier-training-run"]
    loss = {line.name: line.points for line in run["Loss"]}
    first, last = loss["taught training"][0], loss["taught training"][-1]
    assert last[1] < first[1]
    drawn = {line.name for line in run["Reward"]}
    assert "rewarded" in drawn
    assert "taught" not in drawn, "it has no rewards"
    stages = {line.name for line in seen.panels["luthier-queue-and-workers"]["Bad records"]}
    assert stages == {"version INVALID_JSON", "version WRONG_TYPE"}
