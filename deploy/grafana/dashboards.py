"""The dashboards that there are."""

from __future__ import annotations

from deploy.grafana import api, generation, overview, queue_and_workers, stores, training_run

DASHBOARDS = (
    overview.BOARD,
    training_run.BOARD,
    queue_and_workers.BOARD,
    api.BOARD,
    stores.BOARD,
    generation.BOARD,
)
