"""What a tokenizer's native code raises, by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_PANIC = "PanicException"
"""The class that pyo3 makes of a panic of Rust code. It is no Exception and cannot be imported."""


class TokenizerError(ValueError):
    """A tokenizer that fails on a text or on tokens; `reason` is a code a program can switch on."""

    reason = "MODEL_INVALID"


@contextmanager
def tokenizer_errors() -> Iterator[None]:
    """Turn panics of the tokenizers library, and the bare Exceptions it raises, into TokenizerError."""
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != _PANIC:
            raise
        raise TokenizerError(f"the model's tokenizer fails: {error}") from error
