"""Where a model's tokenizer runs: a port, since what runs it under limits stands above. Imports no torch.

A tokenizer.json is a program of sorts, which nobody has read: one of a few lines takes any memory and any time. Work
that reads one is handed to `Apart`, and gives plain facts: no tokenizer is made where models are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from luthier.errors import InvalidArgument, Reason

Apart = Callable[[Callable[[], dict[str, Any]]], dict[str, Any]]
"""Runs work, which returns JSON values and may write files where it is told to, and returns what that returned."""

Facts = TypeVar("Facts")


def here(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run it in this very process, without a limit: for whoever trusts the model."""
    return work()


def facts(apart: Apart, kind: type[Facts], work: Callable[[], Facts]) -> Facts:
    """Return what work returns that reads a tokenizer, a dataclass, from where that is done.

    Raises what the work raised, or `apart`.

    Raises:
        InvalidArgument: MODEL_INVALID; something else came back: files of tokenizers hold any JSON values.
    """

    def told() -> dict[str, Any]:
        built: dict[str, Any] = msgspec.to_builtins(work(), str_keys=True)
        return built

    try:
        return msgspec.convert(apart(told), kind, str_keys=True)
    except msgspec.ValidationError as error:
        raise InvalidArgument(f"the model's tokenizer fails: {error}", reason=Reason.MODEL_INVALID) from error
