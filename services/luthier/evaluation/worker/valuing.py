"""A reward model in memory, and what it values answers at: each written behind its question as its own rows were."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from luthier.errors import Reason
from luthier.evaluation.grading.samples import failed
from luthier.evaluation.precision import precision_of
from luthier.evaluation.worker.answer_text import text_end
from luthier.evaluation.worker.asking import Asker
from luthier.evaluation.worker.loaded_model import LoadedModel
from luthier.evaluation.worker.models import Models
from luthier.evaluation.worker.order import Valued
from luthier.evaluation.worker.turns import turns
from luthier.text.records import SingleRecord
from luthier.text.rendering import RenderingError
from luthier.text.templates import TemplateError
from luthier.text.units import with_text
from luthier.v1.grader_pb2 import SampleGrade
from luthier.work.limited import Check
from luthier.work.retry import Token
from luthier.work.standing import Log
from luthier.worker.v1 import task_pb2


class Answer(NamedTuple):
    """An answer to a record; `is_truncated`: it was cut at its longest length, and so has no end."""

    record: SingleRecord
    text: str
    is_truncated: bool = False


class _Refused(Exception):
    """Why an answer has no value: the grade that says so."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.grade = failed(reason, message)


@dataclass(frozen=True, slots=True, kw_only=True)
class Valuer:
    """A reward model at work.

    Attributes:
        name: as graders say it.
        loaded: the model below its adapter, or itself.
        adapter: its adapter there; None: the loaded model is it.
        asker: writes rows as those were that it was taught by.
        max_tokens: longest row that it reads; 0: it does not say.
        check: raises when the values are not wanted any more.
    """

    name: str
    loaded: LoadedModel
    adapter: str | None
    asker: Asker
    max_tokens: int
    check: Check

    def values(self, answers: Sequence[Answer]) -> list[SampleGrade]:
        """Return the value of each answer as its score, or why it has none.

        The tokens are those of its text in the model's own template and tokenizer. An answer that ended is written to
        the end of its row, one that was cut to the end of its text: the value is that of the last token.

        Raises:
            LuthierError: as the engine, and what `check` raised.
        """
        grades: list[SampleGrade] = []
        rows: list[tuple[int, tuple[int, ...]]] = []
        for place, answer in enumerate(answers):
            self.check()
            grades.append(SampleGrade())
            try:
                rows.append((place, self._row(answer)))
            except _Refused as refusal:
                grades[place] = refusal.grade
        for part in turns(rows, lambda row: len(row[1])):
            wanted = Valued(adapter=self.adapter, sequences=[ids for _, ids in part])
            values = self.loaded.engine.values(wanted, self.check)
            for (place, _), value in zip(part, values, strict=True):
                grades[place] = self._grade(value)
        return grades

    def _row(self, answer: Answer) -> tuple[int, ...]:
        try:
            row = self.asker.answer(with_text(answer.record, answer.text))
        except RenderingError as error:
            raise _Refused(Reason.GRADER_INPUT_INVALID, f"{self.name} cannot read it: {error}") from error
        except TemplateError as error:
            raise _Refused(
                Reason.TEMPLATE_INVALID, f"the chat template of {self.name} refuses it: {error}"
            ) from error
        ids = row.input_ids[: text_end(row)] if answer.is_truncated else row.input_ids
        if self.max_tokens and len(ids) > self.max_tokens:
            raise _Refused(
                Reason.SEQUENCE_TOO_LONG,
                f"an answer behind its question must have at most the {self.max_tokens} tokens that {self.name} reads, "
                f"it has {len(ids)}",
            )
        if not ids:
            raise _Refused(Reason.GRADER_INPUT_INVALID, f"{self.name} has no token to value")
        return ids

    def _grade(self, value: float) -> SampleGrade:
        if math.isfinite(value):
            return SampleGrade(score=value)
        return failed(
            Reason.SCORE_NOT_FINITE, f"the value that {self.name} gives must be finite, got {value}"
        )


def name_of(wanted: task_pb2.RewardModel) -> str:
    """Return the name of a reward model, as graders say it."""
    return (wanted.adapter if wanted.HasField("adapter") else wanted.base_model).name


@contextmanager
def valuing(
    models: Models,
    wanted: task_pb2.RewardModel,
    token: Token,
    check: Check,
    *,
    wait_seconds: float = math.inf,
    log: Log = lambda _text, _severity: None,
) -> Iterator[Valuer]:
    """Keep a reward model loaded for the length of a block. Raises LuthierError as `Models.base` and `.adapter`."""
    adapter = wanted.adapter if wanted.HasField("adapter") else None
    with (
        models.base(
            wanted.base_model,
            token,
            check,
            precision=precision_of(wanted.base_precision),
            is_reward=adapter is None,
            wait_seconds=wait_seconds,
            log=log,
        ) as loaded,
        models.adapter(loaded, adapter, token, check, is_reward=True) as name,
    ):
        yield Valuer(
            name=name_of(wanted),
            loaded=loaded,
            adapter=name,
            asker=loaded.asker(wanted.asking, check),
            max_tokens=wanted.context_length,
            check=check,
        )
