"""Triton's interpreter, which scans its whole language at each call of a function within a kernel: here, once a launch.

That is a fifth of the time of all kernels that the tests interpret; what is computed is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def scanned_once_a_launch() -> Iterator[None]:
    """For the length of a block, prepare the language for each module of functions once in a launch."""
    from triton.runtime import interpreter

    prepare, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    prepared: dict[int, Any] = {}

    def prepare_once(function: Any) -> Any:
        module = id(function.__globals__)
        if module not in prepared:
            prepared[module] = prepare(function)
        return prepared[module]

    def launched(executor: Any, *arguments: Any, **keywords: Any) -> None:
        prepared.clear()  # the end of a launch takes back what was prepared for it
        launch(executor, *arguments, **keywords)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(interpreter, "_patch_lang", prepare_once)
        patched.setattr(interpreter.GridExecutor, "__call__", launched)
        yield
