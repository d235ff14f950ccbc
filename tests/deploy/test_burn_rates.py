"""Each pair of windows of a burn rate fires at its own pace, and ends when its short window is clean."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from deploy.prometheus.alerts import ALERTS
from tests.deploy.conftest import Promtool
from tests.deploy.test_alerts import CALLS, ENDED, TIMES, rules_of

HOUR = 60
EVERY = 10_000
"""Calls, or pieces of work, a minute: shares of them are whole numbers."""


@dataclass(frozen=True, kw_only=True)
class Burn:
    """A share of what goes wrong for some hours, hours without, and the long windows that fire after both."""

    alert: str
    bad: float
    hours: int
    clean_hours: int = 0
    firing: tuple[str, ...]

    def __str__(self) -> str:
        after = f"-then-{self.clean_hours}h-clean" if self.clean_hours else ""
        return f"{self.alert}-{self.bad:.1%}-for-{self.hours}h{after}"

    @property
    def series(self) -> Mapping[str, str]:
        """What is scraped once a minute."""
        burnt, clean = self.hours * HOUR, self.clean_hours * HOUR
        wrong = round(self.bad * EVERY)

        def counted(a_minute: int, cleanly: int) -> str:
            return f"0+{a_minute}x{burnt} {a_minute * burnt + cleanly}+{cleanly}x{clean}"

        if self.alert == "LuthierCallsSlow":
            quick, every = counted(EVERY - wrong, EVERY), counted(EVERY, EVERY)
            times = {TIMES % ("bucket", ", le='1.0'"): quick, TIMES % ("count", ""): every}
            return times | {CALLS % "OK": every}
        good, bad = counted(EVERY - wrong, EVERY), counted(wrong, 0)
        if self.alert == "LuthierCallsFail":
            return {CALLS % "OK": good, CALLS % "Internal": bad}
        return {
            ENDED % ("succeeded", "NONE", "NONE"): good,
            ENDED % ("failed", "service", "WORKER_LOST"): bad,
        }


def paces(alert: str, budget: float) -> list[Burn]:
    """A share between the limits of each two pairs, so that one more of them fires each time; and what is over."""
    return [
        Burn(alert=alert, bad=0.5 * budget, hours=26, firing=()),
        Burn(alert=alert, bad=2 * budget, hours=26, firing=("3d",)),
        Burn(alert=alert, bad=4 * budget, hours=26, firing=("1d", "3d")),
        Burn(alert=alert, bad=10 * budget, hours=26, firing=("1d", "3d", "6h")),
        Burn(alert=alert, bad=20 * budget, hours=26, firing=("1d", "1h", "3d", "6h")),
        Burn(alert=alert, bad=20 * budget, hours=26, clean_hours=1, firing=("1d", "3d")),
        Burn(alert=alert, bad=20 * budget, hours=26, clean_hours=3, firing=("3d",)),
        Burn(alert=alert, bad=20 * budget, hours=26, clean_hours=7, firing=()),
    ]


BURNS = [
    *paces("LuthierCallsFail", 0.001),
    *paces("LuthierCallsSlow", 0.01),
    Burn(alert="LuthierWorkFails", bad=0.005, hours=26, firing=()),
    Burn(alert="LuthierWorkFails", bad=0.02, hours=26, firing=("3d",)),
    Burn(alert="LuthierWorkFails", bad=0.08, hours=26, firing=("3d", "6h")),
    Burn(alert="LuthierWorkFails", bad=0.08, hours=26, clean_hours=2, firing=("3d",)),
    Burn(alert="LuthierWorkFails", bad=0.08, hours=26, clean_hours=7, firing=()),
]


def test_every_pair_is_seen_to_fire_alone_first() -> None:
    """There is a case for each pair in which it fires, and one more that differs from it in nothing but that pair."""
    for alert in {burn.alert for burn in BURNS}:
        pairs = {rule.labels["long"] for rule in ALERTS if rule.alert == alert}
        sets = [set(burn.firing) for burn in BURNS if burn.alert == alert]
        for pair in pairs:
            assert any(pair in some and some - {pair} in sets for some in sets), (alert, pair)


@pytest.mark.parametrize("burn", BURNS, ids=str)
def test_burn_rates(burn: Burn, promtool: Promtool, tmp_path: Path) -> None:
    (rules := tmp_path / "rules.yml").write_text(rules_of(burn.alert))
    expr = f'count by (long) (ALERTS{{alertname="{burn.alert}", alertstate="firing"}}) > bool 0'
    wanted = [{"labels": f'{{long="{long}"}}', "value": 1} for long in burn.firing]
    test = {
        "rule_files": [str(rules)],
        # Rarely, so that days are looked at quickly: how things stand hangs on the last two times alone, as an alert
        # waits for 2 min. Shares first, else alerts are given those of half an hour ago, which are forgotten by then.
        "evaluation_interval": "30m",
        "group_eval_order": ["recorded", "alerts"],
        "tests": [
            {
                "interval": "1m",
                "input_series": [
                    {"series": name.replace("'", '"'), "values": values}
                    for name, values in burn.series.items()
                ],
                "promql_expr_test": [
                    {
                        "expr": expr,
                        "eval_time": f"{(burn.hours + burn.clean_hours) * HOUR}m",
                        "exp_samples": wanted,
                    }
                ],
            }
        ],
    }
    (path := tmp_path / "test.yml").write_text(json.dumps(test))  # JSON is YAML
    promtool(["test", "rules", path], "")
