"""What a service says of itself to who has a key and asks: its version and its clock, in the trailing metadata."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from luthier.runtime.calls import Call

ABOUT_KEY = "luthier-about"
"""Metadata of a call that wants to be told; its value does not matter."""
VERSION_KEY = "luthier-version"
TIME_KEY = "luthier-time"
"""Seconds since 1970 by this process's clock."""
_VERSION = version("luthier")


@asynccontextmanager
async def about_stage(call: Call) -> AsyncIterator[None]:
    """Tell who asks and has shown a key: who has none need not know our version.

    It stands behind the stage of credentials, which lets checks of health pass without one.
    """
    if call.principal and call.metadata(ABOUT_KEY) is not None:
        call.trailers[VERSION_KEY] = _VERSION
        call.trailers[TIME_KEY] = f"{time.time():.6f}"
        call.context.set_trailing_metadata(tuple(call.trailers.items()))
    yield
