"""What an evaluation asks: records and examples chosen by the seed, prompts, and the prefix that they share."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

from luthier.errors import FailedPrecondition, Failure, InvalidArgument, LuthierError, Reason
from luthier.evaluation.worker.asking import Prompts
from luthier.text.records import SingleRecord
from luthier.text.rendering import Rendered, RenderingError
from luthier.text.templates import TemplateError

MIN_PREFIX_TOKENS = 16
_MESSAGE_CHARACTERS = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A record of the version: what is asked, the answer that is right, and where it came from.

    `item_json` is the record as graders see it. `rejected`: of a preference pair the same question with the other
    answer.
    """

    record_id: str
    row: int
    record: SingleRecord
    filename: str = ""
    line: int = 0
    item_json: str = ""
    rejected: SingleRecord | None = None

    @property
    def place(self) -> str:
        """File and line for people."""
        return f"{self.filename}:{self.line}"


class Choosable(Protocol):
    """What a choice goes by."""

    @property
    def record_id(self) -> str:
        """Digest of the record."""
        ...

    @property
    def row(self) -> int:
        """Its place in the version."""
        ...


T = TypeVar("T", bound=Choosable)
Shots = Callable[[Question], Sequence[SingleRecord]]
"""Which worked examples stand before a question, in their order."""


def no_shots(_: Question) -> Sequence[SingleRecord]:
    """Return no example."""
    return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompted:
    """A question as tokens: what asks it, and the whole with its right answer where that is measured."""

    prompt: tuple[int, ...]
    reference: Rendered | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The prompts of one arm, cut into the tokens that all begin with and the rest of each.

    All are by the question's position; a question that cannot be asked has a failure and nothing else.
    """

    prefix: tuple[int, ...]
    prompts: Mapping[int, tuple[int, ...]]
    references: Mapping[int, Rendered]
    failures: Mapping[int, Failure]

    def num_prompt_tokens(self, positions: Iterable[int]) -> int:
        """Tokens that go through the model to read the prompts of some questions."""
        # A record that an earlier attempt answered may be one that this attempt could not render.
        known = (self.prompts[position] for position in positions if position in self.prompts)
        return len(self.prefix) + sum(map(len, known))


def choose(found: Iterable[T], count: int, seed: int) -> list[T]:
    """Return `count` records (0: all) in row order, chosen by a hash of seed and record.

    The same seed chooses the same records however many others there are; a smaller count is part of a larger.
    Memory: `count` records at a time.
    """
    if count == 0:
        return list(found)

    def key(one: T) -> bytes:
        return hashlib.sha256(f"{seed}/{one.record_id}".encode()).digest()

    return sorted(heapq.nsmallest(count, found, key=key), key=lambda one: one.row)


def ask(renderer: Prompts, questions: Sequence[Question], shots: Shots, *, measured: bool) -> Asked:
    """Render the prompts of an arm, and the references where they are measured."""
    prompts: dict[int, tuple[int, ...]] = {}
    references: dict[int, Rendered] = {}
    failures: dict[int, Failure] = {}
    for position, question in enumerate(questions):
        try:
            prompted = prompted_by(renderer, question.record, shots(question), measured=measured)
        except (InvalidArgument, FailedPrecondition) as error:
            if error.reason == Reason.LEASE_LOST:
                raise
            failures[position] = failure_of(error)
            continue
        prompts[position] = prompted.prompt
        if prompted.reference is not None:
            references[position] = prompted.reference
    prefix = shared_prefix(list(prompts.values()))
    rest = {position: prompt[len(prefix) :] for position, prompt in prompts.items()}
    return Asked(prefix=prefix, prompts=rest, references=references, failures=failures)


def prompted_by(
    renderer: Prompts, record: SingleRecord, shots: Sequence[SingleRecord], *, measured: bool
) -> Prompted:
    """Render one question.

    Raises:
        FailedPrecondition: the model has no chat template for conversations.
        InvalidArgument: the template refuses the record.
    """
    with refused_by_renderer():
        prompt = renderer.prompt(record, shots)
        reference = renderer.answer(record, shots) if measured else None
    return Prompted(prompt=prompt, reference=reference)


@contextmanager
def refused_by_renderer() -> Iterator[None]:
    """Raise what a renderer refuses as FailedPrecondition, and what a template does as InvalidArgument."""
    try:
        yield
    except RenderingError as error:
        raise FailedPrecondition(str(error), reason=error.reason) from error
    except TemplateError as error:
        raise InvalidArgument(str(error), reason=Reason.TEMPLATE_INVALID) from error


def failure_of(error: LuthierError) -> Failure:
    """Return why one record failed, its message short enough to stand beside many others."""
    failure = Failure.of(error)
    if len(failure.message) <= _MESSAGE_CHARACTERS:
        return failure
    shortened = failure.message[: _MESSAGE_CHARACTERS - 1] + "…"
    return Failure(code=failure.code, reason=failure.reason, message=shortened)


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
