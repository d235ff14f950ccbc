"""What a shell may complete besides words of ours: names of resources, asked of the services, and of profiles."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import TYPE_CHECKING, Any

import click

from luthier.client.names import short

if TYPE_CHECKING:
    from luthier.client import Client

_MOST = 200
# Somebody waits with a finger on a key.
_PATIENCE_SECONDS = 2.0
Listing = Callable[["Client"], Iterable[Any]]
Completer = Callable[[click.Context, click.Parameter, str], list[str]]


def complete_names(ctx: click.Context, _parameter: click.Parameter, begun: str) -> list[str]:
    """Return names of the resources that a command's group is about, those that go on as what is begun."""
    group = ctx.parent.info_name if ctx.parent is not None else ""
    if group == "datasets":
        return _found(ctx, begun, _datasets_or_versions(begun))
    return _found(ctx, begun, lambda client: getattr(client, str(group)).list(page_size=_MOST))


def names_in(group: str) -> Completer:
    """Return what completes names of the resources of a group, `models` say, for an option of any command."""

    def complete(ctx: click.Context, _parameter: click.Parameter, begun: str) -> list[str]:
        if group == "versions":
            return _found(ctx, begun, _datasets_or_versions(begun))
        return _found(ctx, begun, lambda client: getattr(client, group).list(page_size=_MOST))

    return complete


def complete_profiles(_ctx: click.Context, _parameter: click.Parameter, begun: str) -> list[str]:
    """Return names of profiles."""
    from luthier.client.config import environment
    from luthier.client.profiles import read_profiles
    from luthier.errors import LuthierError

    try:
        profiles = read_profiles(environment())
    except LuthierError:
        return []  # a shell has no place for what is wrong; the command itself says it
    return sorted(name for name in profiles.by_name if name.startswith(begun))


def _datasets_or_versions(begun: str) -> Listing:
    dataset, slash, _ = begun.partition("/")
    if slash:
        return lambda client: client.datasets.versions.list(dataset, page_size=_MOST)
    return lambda client: client.datasets.list(page_size=_MOST)


def _found(ctx: click.Context, begun: str, listing: Listing) -> list[str]:
    options = ctx.find_root().params
    from luthier.client.config import ConfigArguments, silence_grpc

    silence_grpc()
    from luthier.client import Client, RetryPolicy, read_config
    from luthier.errors import LuthierError

    known = {name: options.get(name) for name in ("profile", "project", "home")}
    addresses = {name: options.get(name) for name in options if name.endswith("_address")}
    try:
        arguments = ConfigArguments(
            **known,
            **addresses,
            timeout_seconds=_PATIENCE_SECONDS,
            retry=RetryPolicy(deadline_seconds=_PATIENCE_SECONDS),
        )
        with Client(read_config(arguments)) as client:
            names = [short(resource.name) for resource in islice(listing(client), _MOST)]
    except LuthierError:
        return []  # as above
    return [name for name in names if name.startswith(begun)]
