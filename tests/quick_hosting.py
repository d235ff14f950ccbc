"""Services that a test hosts in its own process stop without a pause, and read the system's certificates once.

Hundreds of tests host a service. Its pause is for callers that learn by health checks that it goes, its certificates
are for receivers of webhooks: tests of either say what they want of them, and real processes have both.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import pytest

from luthier.runtime.server import ServerOptions
from luthier.work.webhooks.posting import trust


@contextmanager
def hosting_quickly() -> Iterator[None]:
    """Have it so for the length of a block."""

    @cache
    def of_the_system() -> ssl.SSLContext:
        return trust(None)

    def trusting_once(ca_file: Path | None) -> ssl.SSLContext:
        return trust(ca_file) if ca_file else of_the_system()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("luthier.work.host.ServerOptions", partial(ServerOptions, drain_seconds=0.0))
        patched.setattr("luthier.work.webhooks.sender.trust", trusting_once)
        yield
