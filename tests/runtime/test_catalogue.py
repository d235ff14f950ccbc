"""The catalogue says of each metric what somebody who meets it must know, in Prometheus's own conventions."""

from __future__ import annotations

import re

import pytest
from prometheus_client import CollectorRegistry

from luthier.errors import Reason
from luthier.runtime.catalogue import ALL, FAMILIES, metrics_of
from luthier.runtime.metric import NONE, OTHER, Metric, Shown, largest, reason_label

LABELS = {
    "device",
    "device_name",
    "fault",
    "fine_tuning_job",
    "finish_reason",
    "grpc_code",
    "grpc_method",
    "grpc_service",
    "grpc_type",
    "kind",
    "kinds",
    "operation",
    "outcome",
    "phase",
    "pool",
    "project",
    "reason",
    "result",
    "stage",
    "state",
    "table",
    "version",
    "worker",
}
"""Of each of these somebody has said how many values it has, and what keeps them from becoming more."""
NAMED_BY_CALLERS = {"project", "fine_tuning_job", "worker"}
"""Those whose values somebody outside chooses: as many are shown as the catalogue has a limit for."""


def test_names_are_told_apart_and_every_family_has_some() -> None:
    assert len({metric.name for metric in ALL}) == len(ALL)
    assert all(metrics_of(family) for family in FAMILIES.values())


@pytest.mark.parametrize("metric", ALL, ids=lambda metric: metric.name)
def test_a_metric_is_declared_whole(metric: Metric) -> None:
    assert re.fullmatch(r"(luthier|grpc_server|process)_[a-z_]+", metric.name)
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert metric.help.endswith((".", ")"))
    assert "?" in metric.question
    assert metric.bound
    assert bool(metric.buckets) == (metric.kind == "histogram")
    assert list(metric.buckets) == sorted(metric.buckets)
    assert metric.services
    words = {
        "seconds": "seconds",
        "bytes": "bytes",
        "ratio": "ratio",
        "timestamp": "time",
        "tokens": "tokens",
    }
    if metric.unit in words:
        assert words[metric.unit] in metric.name, "a name says its unit"
    if metric.labels:
        assert metric.bound != "one" or metric.name == "luthier_build_info"
    assert "job" not in metric.labels, "that is the label of Prometheus's own"
    assert "|" not in metric.help + metric.question + metric.bound, "they stand in a table"


def test_no_label_names_a_model_a_dataset_or_whoever_calls() -> None:
    assert {label for metric in ALL for label in metric.labels} == LABELS
    for metric in ALL:
        if NAMED_BY_CALLERS & set(metric.labels):
            assert re.search(r"at most \d+|\d+ projects", metric.bound), metric.name


def test_reasons_that_are_none_of_ours_are_one_series() -> None:
    assert {reason_label(f"MADE_UP_{number}") for number in range(1000)} == {OTHER}
    assert {reason_label(str(reason)) for reason in Reason} == set(Reason.__members__)
    assert reason_label("") == NONE


def test_of_many_values_the_largest_are_told_apart() -> None:
    values = {f"p{number}": float(number) for number in range(1000)}
    assert largest(values, 3) == {"p999": 999.0, "p998": 998.0, "p997": 997.0, OTHER: 996.0}
    assert largest({"a": 1.0}, 3) == {"a": 1.0}


def test_what_is_shown_anew_takes_the_place_of_what_was_shown() -> None:
    registry = CollectorRegistry()
    metric = Metric(name="luthier_a", kind="gauge", help="A.", question="?", labels=("b",))
    shown = Shown(registry, metric)
    shown.show(metric, [(("x",), 1.0), (("y",), 2.0)])
    shown.show(metric, [(("y",), 3.0)])
    assert registry.get_sample_value("luthier_a", {"b": "x"}) is None
    assert registry.get_sample_value("luthier_a", {"b": "y"}) == 3.0
