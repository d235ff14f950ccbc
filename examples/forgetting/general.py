"""General questions for replay, made of things and forms, and what the base model itself answers to them.

None of them is of the general suite that drift is measured with, nor asks what that asks: it is not learnt by heart.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from chats import turn

from luthier.client import Client
from luthier.v1.chat_pb2 import ChatMessage

FORMS = (
    "Explain in two sentences what {} is used for.",
    "Write one friendly sentence about {}.",
    "Name two things that people like about {}.",
    "Describe {} to a child.",
    "Give me a short tip about {}.",
    "Write a title for a story about {}.",
)
THINGS = (
    "a bicycle", "a library", "a garden", "a kitchen knife", "a train station", "a violin", "a rain coat", "a map",
    "a lighthouse", "a market", "a telescope", "a blanket", "a bakery", "a bridge", "a calendar", "a candle",
    "a compass", "a fountain", "a greenhouse", "a hammer", "a harbour", "a kite", "a ladder", "a mirror", "a museum",
    "a newspaper", "a notebook", "a park", "a piano", "a pencil", "a picnic", "a playground", "a post office",
    "a puzzle", "a radio", "a sailing boat", "a scarf", "a sewing machine", "a shovel", "a soup", "a tea pot",
    "a tent", "a theatre", "a toolbox", "a tractor", "an umbrella", "a vegetable stew", "a walking stick",
    "a watering can", "a windmill",
)  # fmt: skip
_ANSWERS_AT_ONCE = 4
_MAX_NEW_TOKENS = 64


def questions(count: int, *, seed: int) -> list[str]:
    """Return `count` different questions, the same for a seed."""
    every = [form.format(thing) for form in FORMS for thing in THINGS]
    return random.Random(seed).sample(every, count)


def answered(client: Client, model: str, asked: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield a conversation for each question, with what a model says to it."""

    def answer(question: str) -> str:
        pieces = client.generate(
            model, [ChatMessage(role="user", content=question)], max_new_tokens=_MAX_NEW_TOKENS
        )
        return "".join(piece.text for piece in pieces).strip()

    with ThreadPoolExecutor(_ANSWERS_AT_ONCE) as threads:
        for question, text in zip(asked, threads.map(answer, asked), strict=True):
            if text:
                yield {"messages": [turn("user", question), turn("assistant", text)]}
