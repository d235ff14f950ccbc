"""How long a service keeps what is over: events, finished work, answers by request id, what was deleted."""

from __future__ import annotations

from dataclasses import dataclass, fields

from luthier.errors import InvalidArgument

_DAY = 86_400.0
EVENT_KEEP_SECONDS = 90 * _DAY
TASK_KEEP_SECONDS = 30 * _DAY
ANSWER_KEEP_SECONDS = 7 * _DAY
DELETED_KEEP_SECONDS = 30 * _DAY
LEAST_KEEP_SECONDS = 3600.0
"""Less would take from who was away for a moment what is still wanted: the rest of a log, the answer to a call."""
LONGEST_KEEP_SECONDS = 36_525 * _DAY
"""A hundred years: what is longer is a slip, and in the end no time of a calendar."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Keeping:
    """How long what is over is kept: settings of each service.

    Attributes:
        event_keep_seconds: what a resource told before its last event, after its end; 0: for ever.
        task_keep_seconds: tasks, after they were finished, and deliveries of webhooks, after they arrived or were given
            up; 0: for ever.
        answer_keep_seconds: answers by request id: the same call gets the same answer so long; 0: for ever.
        deleted_keep_seconds: what is deleted from now on can be brought back so long, then it is purged.

    Raises:
        InvalidArgument: a time that nothing can be kept for, by the name of the setting.
    """

    event_keep_seconds: float = EVENT_KEEP_SECONDS
    task_keep_seconds: float = TASK_KEEP_SECONDS
    answer_keep_seconds: float = ANSWER_KEEP_SECONDS
    deleted_keep_seconds: float = DELETED_KEEP_SECONDS

    def __post_init__(self) -> None:
        for one in fields(self):
            _check(one.name, getattr(self, one.name))


def _check(name: str, seconds: float) -> None:
    may_be_for_ever = name != "deleted_keep_seconds"
    if (may_be_for_ever and seconds == 0) or LEAST_KEEP_SECONDS <= seconds <= LONGEST_KEEP_SECONDS:
        return
    right = "0 (for ever) or " if may_be_for_ever else ""
    hint = "" if may_be_for_ever else "; what is to go at once is purged, by `delete --now`"
    raise InvalidArgument(
        f"{name} must be {right}from {LEAST_KEEP_SECONDS:.0f} to {LONGEST_KEEP_SECONDS:.0f} (a hundred years), "
        f"got {seconds:.12g}{hint}"
    )
