"""What a reward model values the answers of an evaluation at, once all arms have answered."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from luthier.errors import FailedPrecondition, InvalidArgument, Reason
from luthier.evaluation import shares
from luthier.evaluation.precision import precision_of
from luthier.evaluation.worker.answered import Answered
from luthier.evaluation.worker.arm import ArmAnswers
from luthier.evaluation.worker.asking import Asker
from luthier.evaluation.worker.loaded_model import LoadedModel
from luthier.evaluation.worker.models import Models
from luthier.evaluation.worker.order import Valued
from luthier.evaluation.worker.questions import Question, refused_by_renderer
from luthier.text.units import with_text
from luthier.v1.evaluation_pb2 import FINISH_REASON_STOP
from luthier.work.context import TaskContext
from luthier.worker.v1 import task_pb2


class Rewards:
    """Values answers and keeps the values as answers are kept, so that no attempt does it again.

    Args:
        context: the task.
        answered: what is known so far.
        models: the models in memory.
        judge: the reward model.
    """

    def __init__(
        self, context: TaskContext, answered: Answered, models: Models, judge: task_pb2.RewardModel
    ) -> None:
        self._context = context
        self._answered = answered
        self._models = models
        self._judge = judge

    def add(self, questions: Sequence[Question], answers: Mapping[str, ArmAnswers]) -> Iterator[str]:
        """Set the reward of each answer, in place, and yield what people should know of it.

        Raises:
            LuthierError: the reward model cannot be loaded, or cannot be asked.
        """
        rows = range(len(questions))
        wanted = {arm_id: self._answered.missing(_key(arm_id), rows) for arm_id in answers}
        if any(wanted.values()):
            self._value(questions, answers, wanted)
        for arm_id, said in answers.items():
            kept = {
                record.row: record for batch in self._answered.of(_key(arm_id)) for record in batch.records
            }
            num_lost = 0
            for record in said.records:
                if kept[record.row].HasField("reward"):
                    record.reward = kept[record.row].reward
                else:
                    num_lost += not record.HasField("error")
            if num_lost:
                yield (
                    f"arm {arm_id}: the reward model has no finite value for {num_lost:,} of {len(questions):,} "
                    "answers, which count in its other scores alone"
                )

    def _value(
        self,
        questions: Sequence[Question],
        answers: Mapping[str, ArmAnswers],
        wanted: Mapping[str, Sequence[int]],
    ) -> None:
        judge, context = self._judge, self._context
        has_adapter = judge.HasField("adapter")
        with (
            self._models.base(
                judge.base_model,
                lambda: context.token,
                context.check,
                precision=precision_of(judge.base_precision),
                is_reward=not has_adapter,
                log=context.log,
            ) as loaded,
            self._models.adapter(
                loaded,
                judge.adapter if has_adapter else None,
                lambda: context.token,
                context.check,
                is_reward=True,
            ) as adapter,
        ):
            asker = loaded.asker(judge.asking, context.check)
            for arm_id, firsts in wanted.items():
                for number, first in enumerate(firsts):
                    context.progress(f"valuing answers of arm {arm_id}", number, len(firsts), "batches")
                    together = range(first, min(first + shares.ROWS_A_BATCH, len(questions)))
                    said = [answers[arm_id].records[row] for row in together]
                    records = self._valued(loaded, adapter, asker, said, questions)
                    batch = task_pb2.AnsweredBatch(arm_id=_key(arm_id), first_row=first, records=records)
                    self._answered.add(batch)

    def _valued(
        self,
        loaded: LoadedModel,
        adapter: str | None,
        asker: Asker,
        said: Sequence[task_pb2.AnsweredRecord],
        questions: Sequence[Question],
    ) -> list[task_pb2.AnsweredRecord]:
        made = {record.row: task_pb2.AnsweredRecord(row=record.row) for record in said}
        rows: list[int] = []
        sequences: list[tuple[int, ...]] = []
        for record in said:
            if not record.HasField("error") and (ids := _written(asker, record, questions[record.row])):
                rows.append(record.row)
                sequences.append(ids)
        if sequences:
            values = loaded.engine.values(Valued(adapter=adapter, sequences=sequences), self._context.check)
            for row, value in zip(rows, values, strict=True):
                if math.isfinite(value):
                    made[row].reward = value
        return [made[record.row] for record in said]


def _written(asker: Asker, record: task_pb2.AnsweredRecord, question: Question) -> tuple[int, ...]:
    """Return an answer behind its question as the reward model's rows are written; one that was cut has no end.

    Empty where its template refuses the answer.
    """
    try:
        with refused_by_renderer():
            text = asker.answer(with_text(question.record, record.text))
    except (InvalidArgument, FailedPrecondition) as error:
        if error.reason == Reason.LEASE_LOST:
            raise
        return ()
    if record.finish_reason == FINISH_REASON_STOP:
        return text.input_ids
    ends = [at for at in range(text.num_asking, len(text.input_ids)) if text.input_ids[at] in text.ending_ids]
    return text.input_ids[: ends[-1]] if ends else text.input_ids


def _key(arm_id: str) -> str:
    """Return under which name values are kept: none that an arm may have."""
    return f"reward/{arm_id}"
