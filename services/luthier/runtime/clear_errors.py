"""How a process ends for what whoever started it can mend: one line that says what, no trace."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from luthier.errors import LuthierError


@contextmanager
def clear_errors(exit_code: int = 1) -> Iterator[None]:
    """End the process for an error of ours, a setting that cannot be say, with one line on standard error.

    Any other error passes, with its trace: it is a fault of ours. Around a block, or a decorator of a `main`.
    """
    try:
        yield
    except LuthierError as error:
        print(f"error: {error.message}", file=sys.stderr, flush=True)
        raise SystemExit(exit_code) from error
