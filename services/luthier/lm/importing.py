"""Importing torch and transformers at the start of a process."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager

_TALKATIVE = ("torchao", "torch.utils._pytree")
"""Loggers of torchao, which transformers imports: it warns of libraries for GPUs that its wheel has in vain."""


@contextmanager
def uncollected() -> Iterator[None]:
    """Search for no garbage during a block of imports, and never again in what they made.

    They make two million objects, none of them garbage. The searches took a fifth of a worker's start, and each full
    search after it stood still for 0.3 s.
    """
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
