"""Processes that run templates and tokenizers stay for the next test, as they stay for the next request.

Hundreds of tests need one, and starting it takes longer than all that they ask of it. Pools with other limits than
those of services and workers, which tests about limits have, end theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from luthier.work import text_pool
from luthier.work.limited import LimitedProcess
from luthier.work.limited_pool import POOL_PROCESSES, LimitedPool


@contextmanager
def keeping_processes() -> Iterator[None]:
    """For the length of a block, have pools of texts take over the idle processes of those that were closed."""
    kept: list[LimitedProcess] = []
    close, take = LimitedPool.close, LimitedPool._take

    def leave(pool: LimitedPool) -> None:
        if _is_usual(pool):
            with pool._changed:
                idle, pool._idle = pool._idle, []
            for _, process in idle:
                if process.alive and len(kept) < POOL_PROCESSES:
                    kept.append(process)
                else:
                    process.close()
        close(pool)

    def take_over(pool: LimitedPool, key: str) -> LimitedProcess:
        if _is_usual(pool) and not pool._idle:
            with suppress(IndexError), pool._changed:
                pool._idle.append((key, kept.pop()))
        return take(pool, key)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(LimitedPool, "close", leave)
        patched.setattr(LimitedPool, "_take", take_over)
        yield
    for process in kept:
        process.close()


def _is_usual(pool: LimitedPool) -> bool:
    return pool._module == text_pool._CHILD and pool._limits == text_pool.TEXT_LIMITS
