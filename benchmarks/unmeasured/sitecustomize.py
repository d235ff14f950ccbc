"""Takes what is measured for operators out of a process: on PYTHONPATH, every Python that starts loads it.

For benchmarks/service.py alone: the side that is compared with. Counters, histograms and gauges do nothing, calls and
statements are not timed, phases of a step are not told apart. Patches are applied when a module is imported, so that
no process imports what it would not need.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def _nothing(*_args: object, **_kwargs: object) -> None:
    """Do nothing."""


def _quiet_metrics(module: Any) -> None:
    module.Counter.inc = module.Gauge.inc = module.Gauge.dec = module.Gauge.set = _nothing
    module.Histogram.observe = _nothing


def _quiet_calls(module: Any) -> None:
    module.CallMetrics.started = module.CallMetrics.handled = module.CallMetrics.shed = _nothing


def _quiet_database(module: Any) -> None:
    module.Database.observe = _nothing


def _quiet_phases(module: Any) -> None:
    module.PhaseClock.enter = _nothing


PATCHES: Mapping[str, Callable[[Any], None]] = {
    "prometheus_client.metrics": _quiet_metrics,
    "luthier.runtime.call_metrics": _quiet_calls,
    "luthier.storage.database": _quiet_database,
    "luthier.training.recipes.phases": _quiet_phases,
}
applied: set[str] = set()
"""Names of the modules that were patched in this process."""


class _Patching:
    """Finds the modules of `PATCHES` as they are found otherwise, and patches them once they are there."""

    def find_spec(
        self, name: str, _path: Sequence[str] | None = None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec that patches; None for all other modules."""
        if name not in PATCHES:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            PATCHES[name](module)
            applied.add(name)

        with suppress(AttributeError):
            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Patching())
