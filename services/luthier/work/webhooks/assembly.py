"""The webhooks of a service put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from luthier.runtime.config import read
from luthier.runtime.keys import read_or_create_key
from luthier.runtime.metrics import MetricsServer
from luthier.storage.database import Database
from luthier.work.host import Chore
from luthier.work.keeping import Keeping
from luthier.work.webhooks.config import WebhookConfig
from luthier.work.webhooks.sender import SWEEP_SECONDS, Sender
from luthier.work.webhooks.signing import SECRET_FILE, SECRET_KIND
from luthier.work.webhooks.targets import Targets

_FORGET_SECONDS = 3600.0


class Parts(Protocol):
    """What the process gives its service."""

    @property
    def database(self) -> Database:
        """The service's database."""

    @property
    def metrics(self) -> MetricsServer:
        """The metrics of the process."""

    def at_end(self, close: Callable[[], None]) -> None:
        """Have something closed when this process stops."""


def read_targets() -> tuple[WebhookConfig, Targets]:
    """Return what the environment says of webhooks, and where they may go. Raises InvalidArgument."""
    config = read(WebhookConfig, section="WEBHOOKS")
    return config, Targets(config.addresses, config.networks)


def assemble(parts: Parts, home: Path, config: WebhookConfig, targets: Targets) -> Sender:
    """Return what sends the webhooks of a service until its process stops; its home gets a secret if it has none."""
    secret_file = home / SECRET_FILE
    read_or_create_key(secret_file, SECRET_KIND)
    sender = Sender(parts.database, targets, secret_file, config, parts.metrics.registry)
    parts.at_end(sender.close)
    return sender


def chores(sender: Sender, keeping: Keeping) -> Sequence[Chore]:
    """Return what a service that sends webhooks does beside its calls: a delivery is kept as a finished task is."""
    forget = partial(sender.forget_ended, keeping.task_keep_seconds)
    return (
        Chore(work=sender.sweep, interval_seconds=SWEEP_SECONDS),
        Chore(work=forget, interval_seconds=_FORGET_SECONDS),
    )
