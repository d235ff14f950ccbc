"""Graders, asked once all arms have answered; what they say is kept as answers are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from luthier.errors import Internal, InvalidArgument, Reason
from luthier.evaluation import shares
from luthier.evaluation.grading.samples import Outcomes, SampleGrader, failed, value_of
from luthier.evaluation.worker.answered import Answered
from luthier.evaluation.worker.graded import Graded, graded
from luthier.evaluation.worker.questions import Question
from luthier.evaluation.worker.rewards import Values
from luthier.grading.asked import remote_addresses, remote_graders, reward_model_graders
from luthier.grading.item_fields import ItemFields
from luthier.grading.outcomes import GradingError
from luthier.v1.evaluation_pb2 import FINISH_REASON_STOP, Evaluation
from luthier.v1.grader_pb2 import Grader, RemoteGrader, Sample, SampleGrade
from luthier.work.context import TaskContext
from luthier.work.limited import LimitReached, ProcessBroken
from luthier.work.limited_pool import LimitedPool
from luthier.work.rewards import BATCH_SIZE, TIMEOUT_SECONDS, RewardAddresses, RewardError, scored
from luthier.worker.v1 import task_pb2

MOST_ERRORS = 64
"""Answers in a row without a score, after which a reward service is asked no more: as many as end a job."""
_SECONDS_A_GRADE = 1.0
Records = Sequence[task_pb2.AnsweredRecord]


class Graders:
    """Asks the graders of an evaluation.

    Args:
        context: the task.
        answered: what is answered so far, by graders too.
        evaluation: which has graders.
        questions: what was asked.
        allowed: which reward services may be asked.
        pool: processes that grade.

    Raises:
        InvalidArgument: ADDRESS_NOT_ALLOWED, by this worker; TEMPLATE_FIELD_MISSING, a record lacks what a grader
            reads.
    """

    def __init__(
        self,
        context: TaskContext,
        answered: Answered,
        evaluation: Evaluation,
        questions: Sequence[Question],
        allowed: RewardAddresses,
        pool: LimitedPool,
    ) -> None:
        # Before arms work for hours whose answers could not be graded.
        for index, grader in enumerate(evaluation.graders):
            for field, address in remote_addresses(grader, f"graders[{index}]"):
                allowed.require(address, field)
            require_fields(grader, questions)
        self._context = context
        self._answered = answered
        self._evaluation = evaluation
        self._questions = questions
        self._allowed = allowed
        self._pool = pool
        self._num_done = 0

    @property
    def seconds(self) -> float:
        """The longest that grading should take."""
        num_answers = len(self._evaluation.arms) * len(self._questions)
        return num_answers * sum(_seconds_an_answer(grader) for grader in self._evaluation.graders)

    def graded(self, answers: Mapping[str, Records], values: Mapping[str, Values]) -> Graded:
        """Have all answers graded that no attempt had graded before; return what came of it.

        `values` are what reward models value them at, by the names that graders say.

        Raises:
            LuthierError: the task is not wanted any more, or a process that grades is broken.
        """
        # Grades are of these very answers, and must not be found by an attempt that lacks them.
        self._answered.commit()
        grades: dict[tuple[str, int], dict[str, SampleGrade]] = defaultdict(dict)
        for grader in self._evaluation.graders:
            asker = _Asker(grader, self._allowed, self._pool, self._context, values)
            for arm_id, said in answers.items():
                self._grade(asker, arm_id, said)
                for record in self._kept(grader, arm_id):
                    grades[arm_id, record.row][grader.name] = record.grade
        return graded([grader.name for grader in self._evaluation.graders], dict(grades))

    def _grade(self, asker: _Asker, arm_id: str, said: Records) -> None:
        num_all = len(self._evaluation.graders) * len(self._evaluation.arms) * len(said)
        key = _key(asker.grader, arm_id)
        for first in self._answered.missing(key, range(len(said))):
            phase = f"grader {asker.grader.name}, arm {arm_id}"
            self._context.progress(phase, self._num_done + first, num_all, "answers")
            together = said[first : first + shares.ROWS_A_BATCH]
            samples = {
                record.row: self._sample(record) for record in together if not record.HasField("error")
            }
            grades = dict(zip(samples, asker.grades(arm_id, samples), strict=True))
            records = [
                task_pb2.AnsweredRecord(row=record.row, grade=grades.get(record.row)) for record in together
            ]
            self._answered.add(task_pb2.AnsweredBatch(arm_id=key, first_row=first, records=records))
        self._num_done += len(said)

    def _sample(self, record: task_pb2.AnsweredRecord) -> Sample:
        return Sample(
            item_json=self._questions[record.row].item_json,
            output_text=record.text,
            is_truncated=record.finish_reason != FINISH_REASON_STOP,
        )

    def _kept(self, grader: Grader, arm_id: str) -> Iterator[task_pb2.AnsweredRecord]:
        for batch in self._answered.of(_key(grader, arm_id)):
            yield from (record for record in batch.records if record.HasField("grade"))


def require_fields(grader: Grader, questions: Sequence[Question]) -> None:
    """Return if every record has what a grader's templates read of it.

    Raises:
        InvalidArgument: TEMPLATE_FIELD_MISSING; it names the first record that has not, by file and line, and how many.
    """
    fields = ItemFields(grader)
    missing: list[tuple[Question, GradingError]] = []
    for question in questions if fields else ():
        try:
            fields.require(question.item_json)
        except GradingError as error:
            missing.append((question, error))
    if not missing:
        return
    first, why = missing[0]
    raise InvalidArgument(
        f"records must have what the grader {grader.name} reads of them, {len(missing):,} of {len(questions):,} have "
        f"not; the first is {first.place}: {why.message}",
        reason=why.reason,
        metadata={"grader": grader.name, "filename": first.filename, "line": str(first.line)},
    )


class _Asker:
    """One grader of one evaluation, asked batch after batch."""

    def __init__(
        self,
        grader: Grader,
        allowed: RewardAddresses,
        pool: LimitedPool,
        context: TaskContext,
        values: Mapping[str, Values],
    ) -> None:
        self.grader = grader
        self._context = context
        self._values = {path: values[one.model] for path, one in reward_model_graders(grader)}
        self._services = {path: _Service(remote, allowed, context) for path, remote in remote_graders(grader)}
        self._local = SampleGrader.of(pool, context.task.task, grader)

    def grades(self, arm_id: str, samples: Mapping[int, Sample]) -> list[SampleGrade]:
        """Return what the grader makes of an arm's answers to records, in their order."""
        together = list(samples.values())
        remote = {path: service.scores(together) for path, service in self._services.items()}
        return [
            self._grade(
                sample,
                {path: found[place] for path, found in remote.items()},
                {path: value_of(found[arm_id, row]) for path, found in self._values.items()},
            )
            for place, (row, sample) in enumerate(samples.items())
        ]

    def _grade(self, sample: Sample, remote: Outcomes, values: Outcomes) -> SampleGrade:
        self._context.check()
        try:
            return self._local.grade(sample, remote, values, self._context.check)
        except LimitReached as error:
            words = f"grader {self.grader.name}: grading this answer takes more than {error}"
            return failed(Reason.GRADING_LIMIT_REACHED, words)
        except ProcessBroken as error:
            raise Internal(f"the grader {self.grader.name} cannot be run: {error}") from error


class _Service:
    """A reward service, which is asked no more after too many answers in a row without a score."""

    def __init__(self, remote: RemoteGrader, allowed: RewardAddresses, context: TaskContext) -> None:
        self._remote = remote
        self._allowed = allowed
        self._context = context
        self._in_a_row: list[RewardError] = []

    def scores(self, samples: Sequence[Sample]) -> list[float | RewardError]:
        """Return what it says of each sample, in their order."""
        left = MOST_ERRORS - len(self._in_a_row)
        if left <= 0:
            return [self._asked_no_more()] * len(samples)
        found = scored(self._remote, samples, self._allowed, self._context.check, left)
        for one in found:
            self._in_a_row = [*self._in_a_row, one] if isinstance(one, RewardError) else []
        return found

    def _asked_no_more(self) -> RewardError:
        last, name = self._in_a_row[-1], f"reward service {self._remote.address}: "
        said = last.message.removeprefix(name)
        if not said.startswith("it was asked no more"):
            said = (
                f"it was asked no more after {len(self._in_a_row)} answers in a row without a score, the last of "
                f"them: {said}"
            )
        return RewardError(reason=last.reason, message=f"{name}{said}")


def _seconds_an_answer(grader: Grader) -> float:
    remote = sum(
        (one.timeout_seconds or TIMEOUT_SECONDS) / min(one.max_batch_size or BATCH_SIZE, shares.ROWS_A_BATCH)
        for _, one in remote_graders(grader)
    )
    return _SECONDS_A_GRADE + remote


def _key(grader: Grader, arm_id: str) -> str:
    """Return under which name grades of an arm's answers are kept: none that an arm may have."""
    return f"grader/{grader.name}/{arm_id}"
