"""Prometheus's rules as values, and as the YAML that it reads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Severity = Literal["critical", "warning"]
RUNBOOKS = "docs/runbooks"
"""Below the repository's root."""
_HEAD = "# Written by `make metrics` from {source}; a test compares it.\ngroups:\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """A recorded expression. Its name is level:metric:operation."""

    record: str
    expr: str

    def lines(self) -> Iterator[str]:
        """Yield it as YAML."""
        yield f"- record: {self.record}"
        yield f"  expr: {json.dumps(self.expr)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """An alert, by the conventions of monitoring mixins.

    Attributes:
        alert: its name, LuthierSomethingIsWrong; `runbook` has the page that says what to do.
        expr: what must have been true.
        lasting: for so long, as Prometheus says it.
        severity: critical: somebody should look at once; warning: soon.
        summary: what is wrong, without values.
        description: what is wrong, with them.
        labels: further labels.
    """

    alert: str
    expr: str
    lasting: str
    severity: Severity
    summary: str
    description: str
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def runbook(self) -> str:
        """The page's name."""
        return f"{self.alert}.md"

    def lines(self) -> Iterator[str]:
        """Yield it as YAML."""
        yield f"- alert: {self.alert}"
        yield f"  expr: {json.dumps(self.expr)}"
        yield f"  for: {self.lasting}"
        yield "  labels:"
        for name, value in {"severity": self.severity, **self.labels}.items():
            yield f"    {name}: {json.dumps(value)}"
        yield "  annotations:"
        yield f"    summary: {json.dumps(self.summary)}"
        yield f"    description: {json.dumps(self.description)}"
        yield f"    runbook_url: {RUNBOOKS}/{self.runbook}"


def group_text(source: str, groups: Mapping[str, Sequence[Recording | Alert]]) -> str:
    """Return groups of rules as a file; `source` names the module that has them."""
    lines = []
    for name, rules in groups.items():
        lines += [f"  - name: {name}", "    rules:"]
        lines += [f"      {line}" for rule in rules for line in rule.lines()]
    return _HEAD.format(source=source) + "\n".join(lines) + "\n"
