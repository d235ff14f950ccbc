"""What reward models value the answers of an evaluation at, once all arms have answered."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from luthier.evaluation import shares
from luthier.evaluation.bases import side_by_side
from luthier.evaluation.worker.answered import Answered
from luthier.evaluation.worker.models import Models
from luthier.evaluation.worker.questions import Question
from luthier.evaluation.worker.valuing import Answer, Valuer, name_of, valuing
from luthier.evaluation.worker.wanted import spec_of
from luthier.v1.evaluation_pb2 import FINISH_REASON_STOP
from luthier.v1.grader_pb2 import SampleGrade
from luthier.work.context import TaskContext
from luthier.worker.v1 import task_pb2

_SECONDS_A_VALUE = 2.0
Records = Sequence[task_pb2.AnsweredRecord]
Values = Mapping[tuple[str, int], SampleGrade]
"""What a reward model values answers at, by arm and record: a score, or why there is none. Failed records have none."""


class Rewards:
    """Values answers and keeps the values as answers are kept, so that no attempt does it again.

    Args:
        context: the task.
        answered: what is known so far.
        models: the models in memory.
        questions: what was asked.
    """

    def __init__(
        self, context: TaskContext, answered: Answered, models: Models, questions: Sequence[Question]
    ) -> None:
        self._context = context
        self._answered = answered
        self._models = models
        self._questions = questions
        self._wanted = spec_of(context.task).reward_models

    @property
    def metric(self) -> str:
        """The reward model of the metric; empty where graders alone ask some."""
        return spec_of(self._context.task).evaluation.reward_model

    @property
    def seconds(self) -> float:
        """The longest that valuing should take."""
        num_answers = len(spec_of(self._context.task).arms) * len(self._questions)
        return _SECONDS_A_VALUE * num_answers * len(self._wanted)

    def valued(self, answers: Mapping[str, Records]) -> dict[str, Values]:
        """Have all answers valued that no attempt had valued before; return what came of it by reward model.

        Raises:
            LuthierError: a reward model cannot be loaded or cannot be asked, or the task is not wanted any more.
        """
        # Values are of these very answers, and must not be found by an attempt that lacks them.
        self._answered.commit()
        for together in side_by_side(list(self._wanted), lambda one: one.base_model.digest):
            for one in together:
                self._value(one, answers)
        return {name: self._kept(name, answers) for name in map(name_of, self._wanted)}

    def _value(self, wanted: task_pb2.RewardModel, answers: Mapping[str, Records]) -> None:
        rows, name = range(len(self._questions)), name_of(wanted)
        missing = {arm_id: self._answered.missing(_key(name, arm_id), rows) for arm_id in answers}
        if not any(missing.values()):
            return
        context = self._context
        with valuing(self._models, wanted, lambda: context.token, context.check, log=context.log) as valuer:
            for arm_id, firsts in missing.items():
                for number, first in enumerate(firsts):
                    phase = f"reward model {name.rpartition('/')[2]}, arm {arm_id}"
                    context.progress(phase, number, len(firsts), "batches")
                    said = answers[arm_id][first : first + shares.ROWS_A_BATCH]
                    records = self._records(valuer, said)
                    batch = task_pb2.AnsweredBatch(
                        arm_id=_key(name, arm_id), first_row=first, records=records
                    )
                    self._answered.add(batch)

    def _records(self, valuer: Valuer, said: Records) -> list[task_pb2.AnsweredRecord]:
        there = [record for record in said if not record.HasField("error")]
        grades = valuer.values([self._answer(record) for record in there])
        by_row = {record.row: grade for record, grade in zip(there, grades, strict=True)}
        return [task_pb2.AnsweredRecord(row=record.row, grade=by_row.get(record.row)) for record in said]

    def _answer(self, record: task_pb2.AnsweredRecord) -> Answer:
        is_truncated = record.finish_reason != FINISH_REASON_STOP
        return Answer(self._questions[record.row].record, record.text, is_truncated)

    def _kept(self, name: str, arm_ids: Iterable[str]) -> Values:
        return {
            (arm_id, record.row): record.grade
            for arm_id in arm_ids
            for batch in self._answered.of(_key(name, arm_id))
            for record in batch.records
            if record.HasField("grade")
        }


def set_rewards(name: str, values: Values, answers: Mapping[str, Records]) -> Iterator[str]:
    """Set the reward of each answer, in place, to the value of a model; yield what people should know of it."""
    for arm_id, said in answers.items():
        lost: list[SampleGrade] = []
        for record in said:
            grade = values.get((arm_id, record.row))
            if grade is not None and grade.HasField("score"):
                record.reward = grade.score
            elif grade is not None:
                lost.append(grade)
        if lost:
            yield (
                f"arm {arm_id}: {name} gives no value to {len(lost):,} of {len(said):,} answers, which count in its "
                f"other scores alone; the first: {lost[0].error.message}"
            )


def _key(name: str, arm_id: str) -> str:
    """Return under which name values are kept: none that an arm may have."""
    return f"reward/{name}/{arm_id}"
