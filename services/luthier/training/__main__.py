"""`python -m luthier.training`: run the Training service until SIGTERM."""

from __future__ import annotations

import asyncio
from functools import partial

from luthier.runtime.clear_errors import clear_errors
from luthier.runtime.config import read
from luthier.runtime.logs import configure
from luthier.storage.opening import open_stores
from luthier.training.assembly import PURGED, Allowed, assemble
from luthier.training.config import Config
from luthier.training.jobs import servicer as jobs
from luthier.training.jobs.series import JobSeries, show_running
from luthier.training.models import servicer as models
from luthier.training.peers import DataRenderings
from luthier.training.schema import MIGRATIONS
from luthier.work.host import Hosted, Parts, ServiceSettings, host
from luthier.work.queue import QueueSettings
from luthier.work.rewards import RewardAddresses
from luthier.work.tasks import TaskKind
from luthier.work.webhooks import assembly as webhooks


def settings_of(config: Config) -> ServiceSettings:
    """Return how the service is hosted."""
    return ServiceSettings(
        name="training",
        home=config.home,
        address=config.training_address,
        metrics_address=config.metrics_address,
        projects=config.projects,
        migrations=MIGRATIONS,
        kinds=(TaskKind.REGISTER_MODEL, TaskKind.TRAIN, TaskKind.MERGE, TaskKind.EXPORT),
        queue=QueueSettings(lease_seconds=config.lease_seconds),
        min_free_bytes=config.min_free_bytes,
        blob_grace_seconds=config.blob_grace_seconds,
        blob_stray_seconds=config.blob_stray_seconds,
        keeping=config.keeping,
        database_url=config.database_url,
        blobs_url=config.blobs_url,
    )


def build(parts: Parts, config: Config) -> Hosted:
    """Put the service together on what the process opened."""
    channel = parts.channel(config.data_address)
    parts.holds_at(channel, "the Data service", "renderings")
    renderings = DataRenderings(channel, parts.task_tokens, config.data_address)
    series = JobSeries(parts.metrics.registry)
    parts.work_metrics.observers.append(series)
    webhook_config, targets = webhooks.read_targets()
    allowed = Allowed(rewards=RewardAddresses(config.reward_addresses), webhooks=targets)
    training = assemble(parts, renderings, allowed)
    sender = webhooks.assemble(parts, config.home, webhook_config, targets)
    return Hosted(
        registrations=[jobs.registration(training.jobs), models.registration(training.models)],
        handlers=dict(training.handlers),
        before_serving=partial(show_running, parts.database, parts.log, series),
        chores=webhooks.chores(sender, parts.keeping),
        policy={**jobs.POLICY, **models.POLICY},
        families=training.families,
        purged=PURGED,
    )


@clear_errors()
def main() -> None:
    """Serve."""
    config = read(Config, section="TRAINING")
    configure(config.log_level)
    asyncio.run(host(settings_of(config), lambda parts: build(parts, config), open_stores))


if __name__ == "__main__":
    main()
