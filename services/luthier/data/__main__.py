"""Run the Data service: `python -m luthier.data`."""

from __future__ import annotations

import asyncio

from luthier.data import schema
from luthier.data.assembly import PURGED, assemble
from luthier.data.config import Config
from luthier.data.peers import ModelPeer
from luthier.data.renderings.token_texts import TokenTexts
from luthier.data.row_series import RowSeries
from luthier.data.servicer import POLICY
from luthier.data.uploads.service import FINISH_SECONDS
from luthier.runtime.clear_errors import clear_errors
from luthier.runtime.config import read
from luthier.runtime.logs import configure
from luthier.storage.opening import open_stores
from luthier.work.host import Chore, Hosted, Parts, ServiceSettings, host
from luthier.work.queue import QueueSettings
from luthier.work.tasks import TaskKind
from luthier.work.text_pool import TextPool


def build(parts: Parts, config: Config) -> Hosted:
    """Put the service together on its real adapters."""
    training = parts.channel(config.training_address)
    parts.holds_at(training, "the Training service", "models")
    models = ModelPeer(training, parts.task_tokens)
    token_texts = TokenTexts(parts.blobs, TextPool())
    parts.at_end(token_texts.close)
    parts.work_metrics.observers.append(RowSeries(parts.metrics.registry))
    data = assemble(parts, models, token_texts, config.max_upload_bytes)
    return Hosted(
        registrations=[data.registration],
        handlers=dict(data.handlers),
        policy=POLICY,
        families=data.families,
        chores=[Chore(work=data.uploads.finish_left, interval_seconds=FINISH_SECONDS)],
        purged=PURGED,
    )


def settings_of(config: Config) -> ServiceSettings:
    """Return how to host the service."""
    return ServiceSettings(
        name="data",
        home=config.home,
        address=config.data_address,
        metrics_address=config.metrics_address,
        projects=config.projects,
        migrations=schema.MIGRATIONS,
        kinds=(TaskKind.BUILD_VERSION, TaskKind.RENDER),
        queue=QueueSettings(lease_seconds=config.lease_seconds),
        min_free_bytes=config.min_free_bytes,
        blob_grace_seconds=config.blob_grace_seconds,
        blob_stray_seconds=config.blob_stray_seconds,
        keeping=config.keeping,
        database_url=config.database_url,
        blobs_url=config.blobs_url,
    )


@clear_errors()
def main() -> None:
    """Serve until SIGTERM."""
    config = read(Config, section="DATA")
    configure(config.log_level)
    asyncio.run(host(settings_of(config), lambda parts: build(parts, config), open_stores))


if __name__ == "__main__":
    main()
