"""Every metric that a service exports: what it is called, what it counts, and what question it answers.

A process makes its metrics from these and from nothing else; `docs/metrics.md` is written from them.
"""

from __future__ import annotations

from types import ModuleType

from luthier.runtime.catalogue import calls, process, queue, stores, training, webhooks, work_done, workers
from luthier.runtime.metric import Metric

FAMILIES: dict[str, ModuleType] = {
    "Calls": calls,
    "Queue": queue,
    "Workers": workers,
    "Training": training,
    "Checkpoints, data and generation": work_done,
    "Webhooks": webhooks,
    "Stores": stores,
    "Process": process,
}
"""The modules that declare metrics, by what their part of the page is called."""


def metrics_of(family: ModuleType) -> list[Metric]:
    """Return what a module declares, in its order."""
    return [value for value in vars(family).values() if isinstance(value, Metric)]


ALL: tuple[Metric, ...] = tuple(metric for family in FAMILIES.values() for metric in metrics_of(family))
"""The whole catalogue."""
