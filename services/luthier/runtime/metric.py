"""What a metric is, before any process has one: how it is declared, made and bounded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector

from luthier.errors import Reason

Kind = Literal["counter", "gauge", "histogram"]
Unit = Literal["", "seconds", "bytes", "tokens", "ratio", "rows", "steps", "nats", "timestamp"]
Service = Literal["data", "training", "evaluation"]
SERVICES: tuple[Service, ...] = ("data", "training", "evaluation")
OTHER = "OTHER"
"""Label of what would make too many series: each of them has no series of its own."""
NONE = "NONE"
"""Label of a reason where nobody gave one."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Metric:
    """A metric as the catalogue has it.

    Attributes:
        name: as it is scraped; of a counter it ends in `_total`.
        kind: how its series are read.
        help: what is counted or measured, in words for /metrics.
        question: what somebody who looks at it wants to know.
        labels: names of its labels, each with few values: see `bound`.
        unit: of its values; empty: a number of things.
        buckets: upper bounds of a histogram, the infinite one left out.
        services: those that export it.
        bound: how many series there can be, and why no more.
    """

    name: str
    kind: Kind
    help: str
    question: str
    labels: tuple[str, ...] = ()
    unit: Unit = ""
    buckets: tuple[float, ...] = ()
    services: tuple[Service, ...] = SERVICES
    bound: str = "one"

    def counter(self, registry: CollectorRegistry) -> Counter:
        """Make it, as something that is counted up."""
        assert self.kind == "counter", self.name
        return Counter(self.name, self.help, self.labels, registry=registry)

    def gauge(self, registry: CollectorRegistry) -> Gauge:
        """Make it, as something that is set."""
        assert self.kind == "gauge", self.name
        return Gauge(self.name, self.help, self.labels, registry=registry)

    def histogram(self, registry: CollectorRegistry) -> Histogram:
        """Make it, as something that is observed."""
        assert self.kind == "histogram", self.name
        return Histogram(self.name, self.help, self.labels, registry=registry, buckets=self.buckets)

    def family(self) -> GaugeMetricFamily | CounterMetricFamily:
        """Return it without series, for a collector that forms them when it is asked."""
        if self.kind == "gauge":
            return GaugeMetricFamily(self.name, self.help, labels=self.labels)
        assert self.kind == "counter", self.name
        return CounterMetricFamily(self.name, self.help, labels=self.labels)


def reason_label(reason: str) -> str:
    """Return a reason as a label: those that workers hand on are theirs to choose, the series are not."""
    if not reason:
        return NONE
    return reason if reason in Reason.__members__ else OTHER


def largest(values: Mapping[str, float], most: int) -> dict[str, float]:
    """Return the `most` largest values by name, and the largest of the others as `OTHER` where there are some."""
    if len(values) <= most:
        return dict(values)
    ordered = sorted(values.items(), key=lambda item: (-item[1], item[0]))
    return {**dict(ordered[:most]), OTHER: ordered[most][1]}


Series = tuple[tuple[tuple[str, ...], float], ...]
"""Labels and their values."""


class Shown(Collector):
    """Series that are shown anew as a whole: what is not among them any more is gone. For any thread."""

    def __init__(self, registry: CollectorRegistry, *metrics: Metric) -> None:
        self._series: dict[Metric, Series] = dict.fromkeys(metrics, ())
        registry.register(self)

    def show(self, metric: Metric, series: Iterable[tuple[tuple[str, ...], float]]) -> None:
        """Show these labels and their values, and no others."""
        assert metric in self._series, metric.name
        self._series[metric] = tuple(series)

    def describe(self) -> Iterator[Family]:
        """Yield what `collect` does, without series."""
        return (metric.family() for metric in self._series)

    def collect(self) -> Iterator[Family]:
        """Yield what is shown."""
        for metric, series in self._series.items():
            family = metric.family()
            for labels, value in series:
                family.add_metric(labels, value)
            yield family
