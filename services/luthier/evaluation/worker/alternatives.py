"""Given texts in place of a record's answer: a pair's two sides, and choices. What an arm finds of them is measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from luthier.errors import FailedPrecondition, InvalidArgument, Reason
from luthier.evaluation.worker.answer_text import text_end
from luthier.evaluation.worker.asking import Prompts
from luthier.evaluation.worker.engine import EngineClient
from luthier.evaluation.worker.order import Measured
from luthier.evaluation.worker.questions import Question, refused_by_renderer
from luthier.evaluation.worker.turns import turns
from luthier.text.records import SingleRecord
from luthier.text.rendering import Rendered
from luthier.text.units import with_text
from luthier.work.limited import Check
from luthier.worker.v1 import task_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternatives:
    """Which texts are measured for each record.

    Attributes:
        has_sides: whether they are the two sides of its pair, before all others.
        choices: whether they are these, then.
    """

    has_sides: bool = False
    choices: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.has_sides or bool(self.choices)

    def rendered(
        self, renderer: Prompts, question: Question, shots: Sequence[SingleRecord]
    ) -> list[Rendered]:
        """Return the texts of a record as tokens behind what asks for them.

        Of choices what ends an answer is left out, as lm-eval does: a text is chosen, not that it ends there.

        Raises:
            FailedPrecondition: the model has no chat template for conversations.
            InvalidArgument: the template refuses the record with one of the texts.
        """
        with refused_by_renderer():
            return [
                *(renderer.answer(side, shots) for side in self._sides(question)),
                *(
                    _without_ending(renderer.answer(with_text(question.record, choice), shots))
                    for choice in self.choices
                ),
            ]

    def parts(self, record: task_pb2.AnsweredRecord) -> tuple[list[float], list[float]]:
        """Return what was found of the sides and of the choices of a record, in nats; empty where nothing was."""
        found = [one.logprob for one in record.alternatives]
        num_sides = 2 if self.has_sides else 0
        return found[:num_sides], found[num_sides:]

    def _sides(self, question: Question) -> Sequence[SingleRecord]:
        if not self.has_sides:
            return ()
        assert question.rejected is not None, "records were looked at before"
        return question.record, question.rejected


@dataclass(frozen=True, slots=True, kw_only=True)
class Meter:
    """Measures given texts with one arm.

    Attributes:
        engine: the base model.
        adapter: the arm's; None for the base model itself.
    """

    engine: EngineClient
    adapter: str | None

    def add(self, record: task_pb2.AnsweredRecord, texts: Sequence[Rendered], check: Check) -> None:
        """Add what the arm finds of some texts to a record.

        Raises:
            FailedPrecondition: MODEL_INVALID, one of them has no finite likelihood.
        """
        for part in turns(texts, lambda text: len(text.input_ids)):
            wanted = Measured(
                adapter=self.adapter,
                sequences=[text.input_ids for text in part],
                masks=[text.loss_mask for text in part],
            )
            for score in self.engine.measure(wanted, check):
                if not math.isfinite(score.logprob):
                    raise FailedPrecondition(
                        f"the log-probability of each text must be a finite number, got {score.logprob}; the model's "
                        "weights or its adapter are broken",
                        reason=Reason.MODEL_INVALID,
                    )
                record.alternatives.add(logprob=score.logprob, num_tokens=score.num_tokens)


def _without_ending(text: Rendered) -> Rendered:
    """Return a text of which what ends it is not measured.

    Raises:
        InvalidArgument: nothing else is.
    """
    end = text_end(text)
    mask = [learnt and at < end for at, learnt in enumerate(text.loss_mask)]
    if not any(mask):
        raise InvalidArgument("a choice must have a token besides what ends an answer, it has none")
    return replace(text, loss_mask=tuple(mask))
