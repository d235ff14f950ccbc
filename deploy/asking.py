"""A Prometheus, asked over HTTP."""

from __future__ import annotations

import json
import math
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from deploy.grafana.builder import Dashboard, Panel
from deploy.pictures import Line

_TIMEOUT_SECONDS = 30.0


class Prometheus:
    """Answers of a Prometheus at an address, `http://127.0.0.1:9090`."""

    def __init__(self, address: str) -> None:
        self._address = address

    def range(self, expr: str, first: float, last: float, step_seconds: float) -> list[dict[str, Any]]:
        """Return the series of an expression over a time. Raises OSError where it is refused."""
        question = {"query": expr, "start": str(first), "end": str(last), "step": str(step_seconds)}
        url = f"{self._address}/api/v1/query_range?{urllib.parse.urlencode(question)}"
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as answer:
            found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
            return found

    def panels(
        self, board: Dashboard, variables: Mapping[str, str], first: float, last: float, step_seconds: float
    ) -> dict[str, list[Line]]:
        """Return the lines of each panel of a dashboard by its title; `variables` are Grafana's, with their `$`."""
        return {
            panel.title: self._lines(panel, variables, first, last, step_seconds) for panel in board.panels
        }

    def _lines(
        self, panel: Panel, variables: Mapping[str, str], first: float, last: float, step_seconds: float
    ) -> list[Line]:
        lines = []
        for query in panel.queries:
            expr = query.expr
            for name, value in variables.items():
                expr = expr.replace(name, value)
            for series in self.range(expr, first, last, step_seconds):
                numbers = [(float(time), float(value)) for time, value in series["values"]]
                points = [(time, value) for time, value in numbers if math.isfinite(value)]
                lines.append(Line(name=_name(query.legend, series["metric"]), points=points))
        return lines


def _name(legend: str, labels: Mapping[str, str]) -> str:
    """Return how a series is called: as the legend says, or by its labels."""
    if not legend:
        return ", ".join(_shown_labels(labels)) or "value"
    for name, value in labels.items():
        legend = legend.replace(f"{{{{{name}}}}}", value.rpartition("/")[2])
    return legend


def _shown_labels(labels: Mapping[str, str]) -> Sequence[str]:
    left_out = {"instance", "job", "__name__", "service"}
    return [f"{name} {value}" for name, value in sorted(labels.items()) if value and name not in left_out]
