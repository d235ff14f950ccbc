"""Run the Evaluation service: `python -m luthier.evaluation`."""

from __future__ import annotations

import asyncio

from luthier.evaluation import schema
from luthier.evaluation.access import Access
from luthier.evaluation.aliases.service import AliasService
from luthier.evaluation.aliases.servicer import AliasesServicer
from luthier.evaluation.config import Config
from luthier.evaluation.evaluations.dealing import ShareHandler
from luthier.evaluation.evaluations.service import EvaluationService, Outside
from luthier.evaluation.evaluations.servicer import EvaluateHandler, EvaluationsServicer
from luthier.evaluation.generation.exchange import Exchange
from luthier.evaluation.generation.metrics import GenerationMetrics
from luthier.evaluation.generation.service import GenerationService
from luthier.evaluation.generation.servicer import GenerationServicer
from luthier.evaluation.generation.values import Values
from luthier.evaluation.grading.service import GradingService
from luthier.evaluation.grading.servicer import GradingServicer
from luthier.evaluation.peers import GrpcPeers
from luthier.evaluation.purged import PURGED
from luthier.evaluation.servicer import POLICY, registration
from luthier.runtime.clear_errors import clear_errors
from luthier.runtime.config import read
from luthier.runtime.logs import configure
from luthier.storage.opening import open_stores
from luthier.work.host import Hosted, Parts, ServiceSettings, host
from luthier.work.judge_access import JudgeAccess
from luthier.work.queue import QueueSettings
from luthier.work.rewards import RewardAddresses
from luthier.work.tasks import TaskKind
from luthier.work.webhooks import assembly as webhooks


def build(parts: Parts, config: Config) -> Hosted:
    """Put the service together on its real adapters."""
    data, training = parts.channel(config.data_address), parts.channel(config.training_address)
    parts.holds_at(data, "the Data service", "versions")
    parts.holds_at(training, "the Training service", "models", "checkpoints")
    peers = GrpcPeers(data, training, parts.task_tokens)
    exchange = Exchange(metrics=GenerationMetrics(parts.metrics.registry))
    webhook_config, targets = webhooks.read_targets()
    rewards = RewardAddresses(config.reward_addresses)
    access = Access(judges=JudgeAccess.of(config), rewards=rewards)
    outside = Outside(peers=peers, elsewhere=parts.elsewhere, webhooks=targets, access=access)
    evaluations = EvaluationService(
        parts.database, parts.log, parts.queue, parts.blobs, outside, parts.keeping
    )
    aliases = AliasService(parts.database, peers, evaluations.family, parts.elsewhere)
    generations = GenerationService(exchange, peers, aliases, parts.task_tokens)
    values = Values(exchange, peers, parts.task_tokens)
    grading = GradingService(rewards, values)
    parts.at_end(grading.close)
    sender = webhooks.assemble(parts, config.home, webhook_config, targets)
    registered = registration(
        EvaluationsServicer(evaluations, parts.page_tokens),
        GenerationServicer(generations),
        GradingServicer(grading),
        AliasesServicer(aliases, parts.page_tokens),
    )
    return Hosted(
        registrations=[registered],
        handlers={
            TaskKind.EVALUATE: EvaluateHandler(evaluations),
            TaskKind.ANSWER_SHARE: ShareHandler(evaluations, parts.blobs),
        },
        policy=POLICY,
        purged=PURGED,
        generations=exchange,
        chores=webhooks.chores(sender, parts.keeping),
    )


def settings_of(config: Config) -> ServiceSettings:
    """Return how to host the service."""
    return ServiceSettings(
        name="evaluation",
        home=config.home,
        address=config.evaluation_address,
        metrics_address=config.metrics_address,
        projects=config.projects,
        migrations=schema.MIGRATIONS,
        kinds=(TaskKind.EVALUATE, TaskKind.ANSWER_SHARE),
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
    config = read(Config, section="EVALUATION")
    configure(config.log_level)
    asyncio.run(host(settings_of(config), lambda parts: build(parts, config), open_stores))


if __name__ == "__main__":
    main()
