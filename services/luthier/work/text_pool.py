"""Templates and tokenizers of models, run in limited processes. Loads neither itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from luthier.work.limited import Check, LimitReached, ProcessBroken
from luthier.work.limited_child import Limits
from luthier.work.limited_pool import LimitedPool

_CHILD = "luthier.work.text_child"
OLD_PREFIX = "as the configuration says"
"""Stands for the tokens before plain text of renderings made before they kept theirs: BOS by `add_bos_token` alone."""
TEXT_LIMITS = Limits(cpu_seconds=8, memory_bytes=2 << 30, wall_seconds=40.0)
"""What a prompt may take, and what asking takes of a row that is rendered, so that what is learnt can be asked for. A
million tokens take 3 s of CPU time; a busy machine stretches them, which is why the time is so much longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A tokenizer bundle: a key that no other bundle has, and how to read its files when a process lacks them."""

    key: str
    read: Callable[[], Mapping[str, bytes]]


class TextRefused(Exception):
    """A template, a tokenizer or a record was refused.

    Attributes:
        kind: rendering, template or tokenizer.
        reason: code that a program can switch on.
        message: what was wrong.
        at_limit: whether it took more than a limit allows.
    """

    def __init__(self, kind: str, reason: str, message: str, *, at_limit: bool = False) -> None:
        super().__init__(message)
        self.at_limit = at_limit
        self.kind = kind
        self.reason = reason
        self.message = message


class TextPool:
    """Limited processes that render prompts and decode tokens; for any thread.

    Each request has its limits; requests that share a bundle and a template cannot take all processes. Memory here:
    none but the answers.
    """

    def __init__(self, limits: Limits = TEXT_LIMITS) -> None:
        self._pool = LimitedPool(_CHILD, limits)

    def ask(
        self,
        bundle: Bundle,
        request: Mapping[str, Any],
        *,
        key: str = "",
        check: Check = lambda: None,
    ) -> dict[str, Any]:
        """Return the answer to a request of `text_child`; `key` sets apart who asks in different ways.

        Raises:
            TextRefused: it was refused, or took more than a limit allows: TEMPLATE_INVALID where a template may be
                at fault, MODEL_INVALID where only a tokenizer is.
            LuthierError: as `LimitedPool.call`, or what `check` or `bundle.read` raised.
        """
        asked = {**request, "bundle": bundle.key}
        shared = f"{bundle.key} {key}"
        try:
            answer = self._pool.call(shared, asked, check=check)
            while "unknown" in answer:
                # Another process may answer than the one that was asked first.
                files = {
                    name: data.decode("utf-8", "surrogateescape") for name, data in bundle.read().items()
                }
                answer = self._pool.call(shared, {**asked, "files": files}, check=check)
        except LimitReached as error:
            raise _too_much(request, str(error)) from error
        except ProcessBroken as error:
            raise TextRefused(
                "tokenizer", "MODEL_INVALID", f"the model's tokenizer fails: {error}"
            ) from error
        if "refused" in answer:
            raise TextRefused(**answer["refused"])
        return answer

    def close(self) -> None:
        """End the processes."""
        self._pool.close()


def _too_much(request: Mapping[str, Any], what: str) -> TextRefused:
    if "asked" in request:
        said = f"the chat template takes more than {what}; it must have no unbounded loops"
        return TextRefused("template", "TEMPLATE_INVALID", said, at_limit=True)
    said = f"the model's tokenizer takes more than {what}"
    return TextRefused("tokenizer", "MODEL_INVALID", said, at_limit=True)
