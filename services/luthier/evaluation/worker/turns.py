"""Work for an engine in parts, so that interactive requests have their turn between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
TOKENS_A_TURN = 2048
"""Tokens that an engine reads at most before others have their turn."""


def turns(items: Iterable[T], tokens_of: Callable[[T], int]) -> Iterator[list[T]]:
    """Cut items into parts that have at most `TOKENS_A_TURN` tokens, or are of one that has more."""
    part: list[T] = []
    num_tokens = 0
    for item in items:
        length = tokens_of(item)
        if part and num_tokens + length > TOKENS_A_TURN:
            yield part
            part, num_tokens = [], 0
        part.append(item)
        num_tokens += length
    if part:
        yield part
