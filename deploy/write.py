"""Write everything that is made from the catalogue, the dashboards and the rules: `python -m deploy.write`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from deploy.grafana.dashboards import DASHBOARDS
from deploy.metrics_page import page
from deploy.prometheus import alerts, recording
from deploy.prometheus.rules import group_text

ROOT = Path(__file__).parents[1]


def files() -> Mapping[Path, str]:
    """Return what is written, by path."""
    dashboards = {ROOT / "deploy" / "grafana" / f"{board.uid}.json": board.text() for board in DASHBOARDS}
    rules = {
        ROOT / "deploy" / "prometheus" / "rules.yml": group_text(
            "deploy.prometheus.recording", recording.GROUPS
        ),
        ROOT / "deploy" / "prometheus" / "alerts.yml": group_text("deploy.prometheus.alerts", alerts.GROUPS),
    }
    return {ROOT / "docs" / "metrics.md": page(), **dashboards, **rules}


def main() -> None:
    """Write the files."""
    for path, text in files().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
