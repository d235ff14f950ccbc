"""What is written from the catalogue, the dashboards and the rules is what their code says today."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from deploy.grafana.builder import Dashboard
from deploy.grafana.dashboards import DASHBOARDS
from deploy.prometheus import alerts, recording
from deploy.prometheus.alerts import ALERTS
from deploy.write import ROOT, files
from tests.deploy.conftest import Promtool

from luthier.runtime.catalogue import ALL
from luthier.runtime.metric import Metric

PROMETHEUS_S_OWN = {"up", "ALERTS"}
VALUES = {"$__rate_interval": "5m", "$fine_tuning_job": ".*", "$grpc_service": ".*"}
"""What Grafana puts in the place of its variables."""
WORDS = frozenset(
    re.findall(
        r"\w+",
        "and bool by clamp_min count group_left histogram_quantile increase max min offset on or predict_linear rate "
        "scalar sum time topk unless vector",
    )
)


@pytest.mark.parametrize("path", files(), ids=lambda path: path.name)
def test_files_are_as_they_would_be_written(path: Path) -> None:
    assert path.read_text() == files()[path], f"make metrics, and commit {path.relative_to(ROOT)}"


def test_no_file_is_left_of_a_dashboard_that_is_gone() -> None:
    there = {path.name for path in (ROOT / "deploy" / "grafana").glob("*.json")}
    assert there == {f"{board.uid}.json" for board in DASHBOARDS}


def filled(expr: str) -> str:
    for name, value in VALUES.items():
        expr = expr.replace(name, value)
    return expr


def named_metrics(expr: str) -> set[str]:
    """Names of metrics in an expression: words that are no function, no label and no text."""
    bare = re.sub(r'"[^"]*"', "", filled(expr))
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", bare)
    bare = re.sub(r"\b(by|on|ignoring|without)\s*\([^)]*\)", "", bare)
    return set(re.findall(r"\b[a-zA-Z_][\w:]*\b", bare)) - WORDS


def exported(metric: Metric) -> set[str]:
    if metric.kind != "histogram":
        return {metric.name}
    return {f"{metric.name}_{part}" for part in ("bucket", "sum", "count")}


KNOWN = (
    {name for metric in ALL for name in exported(metric)}
    | {rule.record for group in recording.GROUPS.values() for rule in group}
    | PROMETHEUS_S_OWN
)
EXPRESSIONS = [
    *(query.expr for board in DASHBOARDS for panel in board.panels for query in panel.queries),
    *(rule.expr for group in recording.GROUPS.values() for rule in group),
    *(alert.expr for alert in ALERTS),
]


@pytest.mark.parametrize("expr", EXPRESSIONS)
def test_every_metric_of_an_expression_is_in_the_catalogue(expr: str) -> None:
    assert named_metrics(expr)
    assert named_metrics(expr) <= KNOWN


def test_every_label_that_is_chosen_by_is_one_of_the_metric() -> None:
    labels = {
        name: {*metric.labels, "le", "service", "instance"} for metric in ALL for name in exported(metric)
    }
    for expr in EXPRESSIONS:
        for name, selector in re.findall(r"\b(\w+)\{([^}]*)\}", expr):
            chosen = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector))
            if name in labels:
                assert chosen <= labels[name], expr


def test_expressions_are_what_prometheus_understands(promtool: Promtool, tmp_path: Path) -> None:
    rules = "".join(
        f"    - record: panel:{number}\n      expr: {json.dumps(filled(expr))}\n"
        for number, expr in enumerate(EXPRESSIONS)
    )
    path = tmp_path / "panels.yml"
    path.write_text(f"groups:\n- name: panels\n  rules:\n{rules}")
    assert f"{len(EXPRESSIONS)} rules found" in promtool(["check", "rules", path], "")


def test_prometheus_reads_the_configuration_and_both_files_of_rules(promtool: Promtool) -> None:
    folder = ROOT / "deploy" / "prometheus"
    said = promtool(["check", "config", folder / "prometheus.yml"], "")
    assert f"{len(ALERTS)} rules found" in said
    assert f"{sum(map(len, recording.GROUPS.values()))} rules found" in said


def panels_of(board: Dashboard) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(board.text())["panels"]
    return found


@pytest.mark.parametrize("board", DASHBOARDS, ids=lambda board: board.uid)
def test_a_dashboard_can_be_read(board: Dashboard) -> None:
    """Each panel has a place of its own, a number of its own, and asks the source that is chosen."""
    panels = panels_of(board)
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for place in (panel["gridPos"] for panel in panels):
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken
        taken |= cells
    for panel in panels:
        for target in panel.get("targets", []):
            assert target["datasource"]["uid"] == "${datasource}"
            assert "instance=" not in target["expr"], "whose instances?"
    names = {panel.title for panel in board.panels}
    assert len(names) == len(board.panels)


def test_there_are_the_six_dashboards() -> None:
    assert [board.title.removeprefix("Luthier / ") for board in DASHBOARDS] == [
        "Overview",
        "A training run",
        "Queue and workers",
        "API",
        "Stores",
        "Generation",
    ]


def test_alerts_follow_the_conventions_and_have_their_pages() -> None:
    for alert in ALERTS:
        assert re.fullmatch(r"Luthier([A-Z][a-z]+)+", alert.alert)
        assert alert.summary
        assert "{{" not in alert.summary, "values change: the summary is for grouping"
        assert "{{" in alert.description
        runbook = (ROOT / "docs" / "runbooks" / alert.runbook).read_text()
        assert runbook.startswith(f"# {alert.alert}\n")
        for heading in (
            "## What it says",
            "## What it means for users",
            "## What to look at",
            "## What to do",
        ):
            assert heading in runbook, f"{alert.runbook}: {heading}"
    pages = {path.name for path in (ROOT / "docs" / "runbooks").glob("*.md")}
    assert pages == {alert.runbook for alert in ALERTS}


def test_groups_of_rules_have_names_of_their_own() -> None:
    names = [*recording.GROUPS, *alerts.GROUPS]
    assert len(set(names)) == len(names)


def test_the_page_on_monitoring_lists_every_alert_with_its_severities() -> None:
    page = (ROOT / "docs" / "monitoring.md").read_text()
    rows = re.findall(r"^\| \[(Luthier\w+)\]\(runbooks/(\w+\.md)\) \| ([\w, ]+) \|", page, re.MULTILINE)
    listed = {name: (runbook, severities) for name, runbook, severities in rows}
    wanted = {
        alert.alert: (
            alert.runbook,
            ", ".join(sorted({one.severity for one in ALERTS if one.alert == alert.alert})),
        )
        for alert in ALERTS
    }
    assert listed == wanted
    for board in DASHBOARDS:
        assert f"| {board.title.removeprefix('Luthier / ')} |" in page
        assert f"dashboards/{board.uid}.svg" in page
        assert "Drawn without Grafana" in (ROOT / "docs" / "dashboards" / f"{board.uid}.svg").read_text()
