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


@asynccontextmanager
async def about_stage(call: Call) -> AsyncIterator[None]:
    """Tell who asks. It stands behind the stage of credentials: who has no key need not know our version."""
    if call.metadata(ABOUT_KEY) is not None:
        call.trailers[VERSION_KEY] = version("luthier")
        call.trailers[TIME_KEY] = f"{time.time():.6f}"
        call.context.set_trailing_metadata(tuple(call.trailers.items()))
    yield
