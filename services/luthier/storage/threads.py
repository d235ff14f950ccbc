"""Blocking work in threads of an event loop's own."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from contextvars import copy_context
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


async def finished_in(
    executor: Executor | None, function: Callable[P, R], *arguments: P.args, **named: P.kwargs
) -> R:
    """Return what a function returns in a thread of `executor`, in the caller's context; None: of the event loop's.

    A thread cannot be cancelled: a cancelled caller waits for it, so that none uses what its caller has closed.
    Never call this for work that itself waits for a thread of the same executor.
    """
    call = partial(copy_context().run, function, *arguments, **named)
    work = asyncio.get_running_loop().run_in_executor(executor, call)
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait([work])
        if not work.cancelled():
            work.exception()
        raise
