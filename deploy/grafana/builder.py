"""Grafana dashboards as values: rows of panels, each panel a few expressions. Classic model, schema of Grafana 10."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Unit = Literal["short", "s", "bytes", "percentunit", "reqps", "Bps", "dateTimeFromNow", "ops", "none"]
Kind = Literal["timeseries", "stat", "table"]
_WIDTH = 24
_SCHEMA = 39
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """An expression, and how its series are called.

    Attributes:
        expr: PromQL; `$name` stands for a variable of the dashboard.
        legend: of a series, `{{label}}` stands for a label's value.
    """

    expr: str
    legend: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One picture.

    Attributes:
        title: what it is asked.
        queries: what it shows.
        unit: of its values.
        kind: lines over time, the last value in large, or the last values as a table.
        about: what to make of it, in a sentence or two.
        width: in 24ths of the row.
        height: in Grafana's units, of about 30 pixels.
        stacked: whether lines add up.
    """

    title: str
    queries: Sequence[Query]
    unit: Unit = "short"
    kind: Kind = "timeseries"
    about: str = ""
    width: int = 8
    height: int = 7
    stacked: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Panels under a heading, from left to right, in as many lines as they need."""

    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True, slots=True, kw_only=True)
class Variable:
    """A choice at the top of a dashboard: the values of a metric's label."""

    name: str
    metric: str
    label: str
    multiple: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Dashboard:
    """A dashboard.

    Attributes:
        uid: of its address and its file.
        title: what it is called.
        rows: what it shows.
        variables: what can be chosen.
        since: the time that it shows at first, as Grafana says it.
    """

    uid: str
    title: str
    rows: Sequence[Row]
    variables: Sequence[Variable] = ()
    since: str = "now-6h"

    @property
    def panels(self) -> list[Panel]:
        """Its panels in order."""
        return [panel for row in self.rows for panel in row.panels]

    def text(self) -> str:
        """Return it as the JSON that Grafana imports."""
        return json.dumps(self._model(), indent=2) + "\n"

    def _model(self) -> dict[str, Any]:
        source = {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}
        return {
            "uid": self.uid,
            "title": self.title,
            "tags": ["luthier"],
            "schemaVersion": _SCHEMA,
            "editable": False,
            "graphTooltip": 1,
            "refresh": "30s",
            "time": {"from": self.since, "to": "now"},
            "templating": {"list": [source, *map(_variable, self.variables)]},
            "links": [
                {
                    "type": "dashboards",
                    "tags": ["luthier"],
                    "title": "Luthier",
                    "asDropdown": True,
                    "keepTime": True,
                }
            ],
            "panels": list(self._placed()),
        }

    def _placed(self) -> Iterator[dict[str, Any]]:
        number, y = 0, 0
        for row in self.rows:
            number += 1
            yield {"id": number, "type": "row", "title": row.title, "collapsed": False, "panels": []} | {
                "gridPos": {"x": 0, "y": y, "w": _WIDTH, "h": 1}
            }
            y, x, height = y + 1, 0, 0
            for panel in row.panels:
                if x + panel.width > _WIDTH:
                    y, x, height = y + height, 0, 0
                number += 1
                place = {"x": x, "y": y, "w": panel.width, "h": panel.height}
                yield {"id": number, "gridPos": place} | _panel(panel)
                x, height = x + panel.width, max(height, panel.height)
            y += height


def _panel(panel: Panel) -> dict[str, Any]:
    custom: dict[str, Any] = {"fillOpacity": 10, "showPoints": "never"}
    if panel.stacked:
        custom = {"fillOpacity": 60, "showPoints": "never", "stacking": {"mode": "normal", "group": "A"}}
    is_series = panel.kind == "timeseries"
    made: dict[str, Any] = {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": _SOURCE,
        "fieldConfig": {
            "defaults": {"unit": panel.unit, **({"custom": custom} if is_series else {})},
            "overrides": [],
        },
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}} if is_series else {},
        "targets": [_target(query, number, panel.kind) for number, query in enumerate(panel.queries)],
    }
    if panel.kind == "table":
        made["transformations"] = [{"id": "merge", "options": {}}]
    return made


def _target(query: Query, number: int, kind: Kind) -> dict[str, Any]:
    shape: dict[str, Any] = {"range": True} if kind == "timeseries" else {"instant": True}
    if kind == "table":
        shape["format"] = "table"
    return {
        "refId": chr(ord("A") + number),
        "datasource": _SOURCE,
        "expr": query.expr,
        "legendFormat": query.legend or "__auto",
        **shape,
    }


def _variable(variable: Variable) -> dict[str, Any]:
    return {
        "name": variable.name,
        "type": "query",
        "datasource": _SOURCE,
        "query": {"query": f"label_values({variable.metric}, {variable.label})", "refId": variable.name},
        "refresh": 2,
        "sort": 1,
        "multi": variable.multiple,
        "includeAll": variable.multiple,
        "allValue": ".*" if variable.multiple else None,
    }
