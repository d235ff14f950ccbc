"""Who is told of the end of a job or an evaluation: the flag, and what became of telling."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from luthier.client.cli.drafts import field_option

if TYPE_CHECKING:
    from rich.table import Table

    from luthier.v1.webhook_pb2 import WebhookDelivery


@dataclass(frozen=True, slots=True, kw_only=True)
class Notified:
    """A URL as it was typed; its text is what stands for it in a message."""

    word: str

    def __str__(self) -> str:
        return json.dumps({"url": self.word})


def _notified(
    _context: click.Context, _option: click.Parameter, words: Sequence[str]
) -> tuple[Notified, ...]:
    return tuple(Notified(word=word) for word in words)


notify_option = field_option(
    "--notify",
    "webhooks",
    field="webhooks",
    metavar="URL",
    multiple=True,
    callback=_notified,
    help="Tell this URL of the end, by a signed POST; the operator allows which.  [repeatable]",
)
"""The flag of everything that tells webhooks of its end."""


def delivery_table(deliveries: Iterable[WebhookDelivery]) -> Table:
    """Return what became of telling each webhook."""
    from luthier.client.cli.views import table, when
    from luthier.v1.webhook_pb2 import WebhookDelivery

    made = table("URL", "EVENT", "STATE", "#ATTEMPTS", "LAST (UTC)", "NEXT (UTC)", "PROBLEM")
    for one in deliveries:
        made.add_row(
            one.url,
            one.event_type,
            WebhookDelivery.State.Name(one.state).removeprefix("STATE_"),
            str(one.num_attempts),
            when(one.last_attempt_time),
            when(one.next_attempt_time),
            one.last_error,
        )
    return made
