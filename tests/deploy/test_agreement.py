"""What the services serve on /metrics is what the catalogue says, and what Prometheus's own checks find right."""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from tests.deploy.conftest import Promtool
from tests.stores import service_urls

from luthier.data import __main__ as data
from luthier.data.config import Config as DataConfig
from luthier.evaluation import __main__ as evaluation
from luthier.evaluation.config import Config as EvaluationConfig
from luthier.runtime.catalogue import ALL
from luthier.runtime.metric import Metric, Service
from luthier.storage.opening import open_stores
from luthier.training import __main__ as training
from luthier.training.config import Config as TrainingConfig
from luthier.work.host import Hosted, Parts, ServiceSettings, hosting

Hosting = tuple[ServiceSettings, Callable[[Parts], Hosted]]
ANYWHERE: Mapping[str, Any] = {
    "log_level": "INFO",
    "projects": ("default",),
    "data_address": "127.0.0.1:0",
    "training_address": "127.0.0.1:0",
    "metrics_address": "127.0.0.1:0",
}


def hosted(service: Service, home: Path) -> Hosting:
    """How a service is hosted by its own main module, on free ports."""
    if service == "data":
        of_data = DataConfig(home=home, **service_urls(home, service), **ANYWHERE)
        return data.settings_of(of_data), lambda parts: data.build(parts, of_data)
    if service == "training":
        of_training = TrainingConfig(
            home=home, reward_addresses=(), **service_urls(home, service), **ANYWHERE
        )
        return training.settings_of(of_training), lambda parts: training.build(parts, of_training)
    of_evaluation = EvaluationConfig(
        home=home,
        reward_addresses=(),
        judge_addresses=(),
        judge_keys=(),
        evaluation_address="127.0.0.1:0",
        **service_urls(home, service),
        **ANYWHERE,
    )
    return evaluation.settings_of(of_evaluation), lambda parts: evaluation.build(parts, of_evaluation)


async def page(service: Service, home: Path) -> str:
    """The page of a service that has just begun."""
    settings, build = hosted(service, home)
    ports: list[Parts] = []

    def kept(parts: Parts) -> Hosted:
        ports.append(parts)
        return build(parts)

    async with hosting(settings, kept, open_stores):
        await ports[0].figures.look()
        return generate_latest(ports[0].metrics.registry).decode()


def families(text: str) -> dict[str, tuple[str, frozenset[str], str]]:
    """Type, labels and help of each metric of a page that has series, by its name in the catalogue."""
    found = {}
    for family in text_string_to_metric_families(text):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = frozenset(label for sample in family.samples for label in sample.labels) - {"le"}
        found[name] = (family.type, labels, family.documentation)
    return found


def said(metric: Metric) -> tuple[str, frozenset[str], str]:
    return metric.kind, frozenset(metric.labels), metric.help


@pytest.mark.parametrize("service", ["data", "training", "evaluation"])
async def test_a_service_exports_what_the_catalogue_says_of_it(
    service: Service, tmp_path: Path, promtool: Promtool
) -> None:
    text = await page(service, tmp_path / "home")
    shown = families(text)
    wanted = {metric.name: said(metric) for metric in ALL if service in metric.services}
    assert shown.keys() == wanted.keys()
    for name, (kind, labels, documentation) in shown.items():
        assert (kind, documentation) == (wanted[name][0], wanted[name][2]), name
        # What has had nothing to count yet has no series, and so shows no labels.
        assert labels in (wanted[name][1], frozenset()), name
    assert promtool(["check", "metrics"], text) == ""


async def test_a_page_comes_over_the_wire(tmp_path: Path) -> None:
    from luthier.runtime.metrics import MetricsServer

    server = MetricsServer("127.0.0.1:0")
    async with server.serving() as port:
        url = f"http://127.0.0.1:{port}/metrics"
        text = await asyncio.to_thread(lambda: urllib.request.urlopen(url).read().decode())
    assert {"luthier_build_info", "process_cpu_seconds_total"} <= families(text).keys()
    assert "_created" not in text


def test_promtool_finds_nothing_wrong_with_any_of_them(promtool: Promtool) -> None:
    registry = CollectorRegistry()
    for metric in ALL:
        values = ["a"] * len(metric.labels)
        made = {"counter": metric.counter, "gauge": metric.gauge, "histogram": metric.histogram}[metric.kind](
            registry
        )
        if metric.labels:
            made.labels(*values)
    assert promtool(["check", "metrics"], generate_latest(registry).decode()) == ""
