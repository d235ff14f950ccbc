"""What an evaluation asks: records and examples chosen by the seed, prompts, and the prefix that they share."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from luthier.errors import FailedPrecondition, InvalidArgument, Reason
from luthier.evaluation.worker.asking import Prompts
from luthier.text.records import Record
from luthier.text.rendering import Rendered, RenderingError
from luthier.text.templates import TemplateError

MIN_PREFIX_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A record of the version: what is asked, and the answer that is right."""

    record_id: str
    row: int
    record: Record


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The prompts of one arm, cut into the tokens that all begin with and the rest of each."""

    prefix: tuple[int, ...]
    prompts: tuple[tuple[int, ...], ...]
    answers: tuple[Rendered, ...]

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens that go through the model to read the prompts."""
        return len(self.prefix) + sum(len(prompt) for prompt in self.prompts)


def choose(questions: Sequence[Question], count: int, seed: int) -> list[Question]:
    """Return `count` questions (0: all) in row order, chosen by a hash of seed and record.

    The same seed chooses the same records however many others there are; a smaller count is part of a larger.
    """
    if count == 0 or count >= len(questions):
        return list(questions)

    def key(question: Question) -> bytes:
        return hashlib.sha256(f"{seed}/{question.record_id}".encode()).digest()

    return sorted(sorted(questions, key=key)[:count], key=lambda question: question.row)


def ask(renderer: Prompts, questions: Sequence[Question], shots: Sequence[Record]) -> Asked:
    """Render the prompts of an arm.

    Raises:
        FailedPrecondition: the model has no chat template for conversations.
        InvalidArgument: the template refuses a record; the message names its row.
    """
    prompts: list[tuple[int, ...]] = []
    answers: list[Rendered] = []
    for question in questions:
        try:
            prompts.append(renderer.prompt(question.record, shots))
            answers.append(renderer.answer(question.record, shots))
        except RenderingError as error:
            raise FailedPrecondition(f"row {question.row}: {error}", reason=error.reason) from error
        except TemplateError as error:
            raise InvalidArgument(f"row {question.row}: {error}", reason=Reason.TEMPLATE_INVALID) from error
    prefix = shared_prefix(prompts)
    rest = tuple(prompt[len(prefix) :] for prompt in prompts)
    return Asked(prefix=prefix, prompts=rest, answers=tuple(answers))


def shared_prefix(prompts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the tokens that all prompts begin with, at least one token short of each prompt.

    Fewer than `MIN_PREFIX_TOKENS` are not worth a cache of their own.
    """
    if not prompts:
        return ()
    first, last = min(prompts), max(prompts)
    limit = min(len(prompt) for prompt in prompts) - 1
    length = next((at for at in range(limit) if first[at] != last[at]), limit)
    return first[:length] if length >= MIN_PREFIX_TOKENS else ()
