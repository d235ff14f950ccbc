"""Run one evaluation: the same questions to every arm, then scores, intervals and comparisons."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import NamedTuple

from luthier.errors import LuthierError, Reason, ResourceExhausted, Unavailable
from luthier.evaluation.access import NOBODY, Access
from luthier.evaluation.bases import side_by_side
from luthier.evaluation.grading.samples import grading_pool
from luthier.evaluation.precision import precision_of
from luthier.evaluation.shares import ROWS_A_BATCH
from luthier.evaluation.worker.answered import COMMIT_SECONDS, Answered
from luthier.evaluation.worker.arm import ArmAnswers, ArmRunner, Manner, require_an_answer
from luthier.evaluation.worker.assessing import Assessed, Assessing, Means
from luthier.evaluation.worker.contamination import TrainingRecords
from luthier.evaluation.worker.drift import Drift
from luthier.evaluation.worker.drift_suite import Suite, general, of_version, suite_questions
from luthier.evaluation.worker.loaded_model import LoadedModel
from luthier.evaluation.worker.models import Models
from luthier.evaluation.worker.outcome import result_of, write_answers
from luthier.evaluation.worker.questions import Question, Shots, choose
from luthier.evaluation.worker.references import Grading, grading_of
from luthier.evaluation.worker.shots import MAX_CANDIDATES, Similar, require_enough, same_for_all
from luthier.evaluation.worker.splits import Pinned, Splits
from luthier.evaluation.worker.wanted import Wanted, spec_of
from luthier.v1 import dataset_pb2, evaluation_pb2
from luthier.v1.evaluation_pb2 import SHOT_CHOICE_SIMILAR, SHOT_CHOICE_UNSPECIFIED
from luthier.work.context import TaskCancelled, TaskContext, TaskFailed, TaskStopped
from luthier.work.limits import answering_seconds
from luthier.worker.v1 import task_pb2

_SHOT_SEED_OFFSET = 1
_CHOICES = (SHOT_CHOICE_UNSPECIFIED, SHOT_CHOICE_SIMILAR)
_GRADING_PROCESSES = 2
_GRADING_WAIT_SECONDS = 600.0
"""A worker runs one task at a time: nobody else has them for longer than an answer may take."""
_OF_THE_BASE = (evaluation_pb2.TEMPLATE_SOURCE_UNSPECIFIED, evaluation_pb2.TEMPLATE_SOURCE_BASE)


class _Asked(NamedTuple):
    """What the arms of one base model are asked with."""

    context: TaskContext
    loaded: LoadedModel
    answered: Answered
    wanted: Wanted
    grading: Grading
    phase: str
    num_answers: int


class Evaluator:
    """The runner of EVALUATE and ANSWER_SHARE tasks: these want answers, those the outcome too.

    Args:
        data_address: host:port of the Data service.
        models: the models in memory.
        access: whom judges and graders may ask outside of Luthier.
        commit_seconds: time between commits of answers at least.
    """

    def __init__(
        self,
        data_address: str,
        models: Models,
        access: Access = NOBODY,
        commit_seconds: float = COMMIT_SECONDS,
    ) -> None:
        self._splits = Splits(data_address)
        self._training = TrainingRecords(data_address)
        self._models = models
        self._pool = grading_pool(_GRADING_PROCESSES, _GRADING_WAIT_SECONDS)
        self._means = Means(models=models, access=access, pool=self._pool)
        self._commit_seconds = commit_seconds

    def __call__(self, context: TaskContext) -> task_pb2.TaskResult:
        """Run the evaluation of a task, or a share of it, going on after the answers that are committed.

        Raises:
            Unavailable: CRASHED or STALLED, the model's process; what was answered is kept for the next attempt.
            TaskFailed: why it failed, and what was answered; OUT_OF_MEMORY among others.
            LuthierError: why it failed.
        """
        spec = spec_of(context.task)
        evaluation = spec.evaluation
        context.progress("loading", 0, 0, "arms")
        questions = self._splits.read(context, evaluation.split, evaluation.max_records, evaluation.seed)
        wanted = Wanted(spec, len(questions))
        context.announce(answering_seconds(wanted.num_answers, evaluation.max_new_tokens))
        grading = grading_of(evaluation, questions)
        answered = Answered(context, self._commit_seconds)
        assessing = Assessing(context, answered, questions, wanted, self._means)
        drift = self._drift(context, answered, wanted)
        try:
            with _sizes_named(evaluation):
                answers = self._asked(context, answered, questions, grading, wanted, drift)
                assessed = assessing.assessed(answers)
            answered.commit()
            if not wanted.is_share:
                return self._result(context, grading, questions, answers, assessed, drift)
        except TaskCancelled as error:
            if not answered.num_records:
                raise
            raise TaskStopped(self._known(context, grading, questions, answered, wanted)) from error
        except LuthierError as error:
            if _is_lost(error):
                # Another attempt follows, which need not ask again what was answered.
                with suppress(ResourceExhausted):  # a full disk
                    answered.commit()
                raise Unavailable(error.message, reason=error.reason, metadata=error.metadata) from error
            if error.reason == Reason.LEASE_LOST or not answered.num_records:
                raise
            raise TaskFailed(error, self._known(context, grading, questions, answered, wanted)) from error
        return self._known(context, grading, questions, answered, wanted)

    def close(self) -> None:
        """Hang up."""
        self._pool.close()
        self._splits.close()
        self._training.close()

    def _asked(
        self,
        context: TaskContext,
        answered: Answered,
        questions: Sequence[Question],
        grading: Grading,
        wanted: Wanted,
        drift: Drift | None,
    ) -> dict[str, ArmAnswers]:
        """Ask the arms of one base model after those of another; return what they said in the order of the arms."""
        evaluation = spec_of(context.task).evaluation
        precision, shots = precision_of(evaluation.base_precision), self._shots(context, evaluation)
        num_answers = wanted.num_all
        answers: dict[str, ArmAnswers] = {}
        groups = side_by_side(wanted.arms, wanted.base_of)
        for arms in drift.groups(groups) if drift else groups:
            base = wanted.base(arms[0])
            with self._models.base(
                base, lambda: context.token, context.check, precision=precision, log=context.log
            ) as loaded:
                for arm in arms:
                    phase = f"arm {arm.arm.arm_id}, {len(answers) + 1} of {len(wanted.arms)}"
                    asked = _Asked(context, loaded, answered, wanted, grading, phase, num_answers)
                    answers[arm.arm.arm_id] = self._arm(asked, arm, questions, shots(arm.arm))
                if drift:
                    self._probe(context, loaded, arms, drift)
        return {arm.arm.arm_id: answers[arm.arm.arm_id] for arm in wanted.arms}

    def _probe(
        self, context: TaskContext, loaded: LoadedModel, arms: Sequence[task_pb2.ArmModel], drift: Drift
    ) -> None:
        for arm in drift.of(arms):
            with self._adapter(context, loaded, arm) as name:
                drift.ask(loaded, arm, name)

    def _adapter(
        self, context: TaskContext, loaded: LoadedModel, arm: task_pb2.ArmModel, *, asks: bool = True
    ) -> AbstractContextManager[str | None]:
        adapter = arm.adapter if asks and arm.HasField("adapter") else None
        return self._models.adapter(loaded, adapter, lambda: context.token, context.check)

    def _arm(
        self,
        asked: _Asked,
        arm: task_pb2.ArmModel,
        questions: Sequence[Question],
        shots: Shots,
    ) -> ArmAnswers:
        arm_id, context, wanted = arm.arm.arm_id, asked.context, asked.wanted
        rows = wanted.rows(arm_id)
        # Who only scores what others have answered needs no adapter.
        asks = bool(asked.answered.missing(arm_id, rows))
        evaluation = spec_of(context.task).evaluation
        manner = Manner(
            asking=arm.asking,
            max_new_tokens=evaluation.max_new_tokens,
            seed=evaluation.seed,
            is_measured=bool(asked.grading.ratios),
            alternatives=asked.grading.alternatives,
        )
        with self._adapter(context, asked.loaded, arm, asks=asks) as name:
            runner = ArmRunner(
                context,
                asked.loaded,
                name,
                asked.answered,
                manner=manner,
                phase=asked.phase,
                num_answers=asked.num_answers,
            )
            answers = runner.run(arm_id, questions, shots, rows)
        if not wanted.is_share:
            require_an_answer(arm_id, answers.records, questions)
        return answers

    def _drift(self, context: TaskContext, answered: Answered, wanted: Wanted) -> Drift | None:
        """Return what measures drift where it is wanted: by whoever scores too, as it needs what the baseline says."""
        evaluation = spec_of(context.task).evaluation
        if wanted.is_share or not evaluation.HasField("drift"):
            return None
        drift = Drift(context, answered, evaluation, self._suite(context, evaluation), wanted.num_all)
        wanted.expect(drift.num_answers)
        context.announce(answering_seconds(drift.num_answers, evaluation.drift.max_new_tokens))
        return drift

    def _suite(self, context: TaskContext, evaluation: evaluation_pb2.Evaluation) -> Suite:
        probe = evaluation.drift
        if not probe.dataset_version:
            return general(choose(suite_questions(), probe.max_questions, evaluation.seed))
        version = Pinned(probe.dataset_version, probe.dataset_digest)
        questions = self._splits.read(
            context, probe.split, probe.max_questions, evaluation.seed, version=version
        )
        return of_version(questions, probe)

    def _shots(
        self, context: TaskContext, evaluation: evaluation_pb2.Evaluation
    ) -> Callable[[evaluation_pb2.EvaluationArm], Shots]:
        """Return which examples each arm is given. Raises FailedPrecondition as `require_enough`."""
        arms = {choice: [arm for arm in evaluation.arms if arm.shot_choice == choice] for choice in _CHOICES}
        same, similar = (max((arm.num_shots for arm in arms[choice]), default=0) for choice in _CHOICES)
        seed = evaluation.seed + _SHOT_SEED_OFFSET
        chosen = self._splits.read(context, dataset_pb2.SPLIT_TRAIN, same, seed) if same else []
        require_enough(arms[SHOT_CHOICE_UNSPECIFIED], len(chosen))
        examples = [question.record for question in chosen]
        if not similar:
            return lambda arm: same_for_all(examples[: arm.num_shots])
        candidates = self._splits.read(
            context, dataset_pb2.SPLIT_TRAIN, MAX_CANDIDATES, seed, right_only=True
        )
        require_enough(arms[SHOT_CHOICE_SIMILAR], len(candidates))
        found = Similar(candidates, similar, seed)
        return lambda arm: (
            found.shots(arm.num_shots)
            if arm.shot_choice == SHOT_CHOICE_SIMILAR
            else same_for_all(examples[: arm.num_shots])
        )

    def _result(
        self,
        context: TaskContext,
        grading: Grading,
        questions: Sequence[Question],
        answers: Mapping[str, ArmAnswers],
        assessed: Assessed,
        drift: Drift | None,
    ) -> task_pb2.TaskResult:
        context.progress("scoring", 0, 0, "arms")
        path = context.scratch / "predictions"
        learnt = self._training.look_up(context, questions)
        outcome = result_of(
            context.task.evaluate.evaluation, grading, questions, answers, assessed, learnt, path
        )
        outcome.warnings.extend(_unknown(context.task.evaluate.arms))
        if drift:
            outcome.drift_results.extend(drift.results())
            outcome.warnings.extend(drift.warnings())
        for warning in outcome.warnings:
            context.log(warning, "WARNING")
        outcome.predictions.CopyFrom(context.store(path, "predictions"))
        return task_pb2.TaskResult(evaluate=outcome)

    def _known(
        self,
        context: TaskContext,
        grading: Grading,
        questions: Sequence[Question],
        answered: Answered,
        wanted: Wanted,
    ) -> task_pb2.TaskResult:
        path = context.scratch / "predictions"
        said = {
            arm.arm.arm_id: [record for batch in answered.of(arm.arm.arm_id) for record in batch.records]
            for arm in wanted.arms
        }
        num_records = write_answers(grading, questions, said, path, wanted.records)
        stored = context.store(path, "predictions")
        if wanted.is_share:
            answers = task_pb2.AnswerShareResult(num_records=num_records, predictions=stored)
            return task_pb2.TaskResult(answer_share=answers)
        outcome = task_pb2.EvaluateResult(num_records=num_records, predictions=stored)
        return task_pb2.TaskResult(evaluate=outcome)


def _is_lost(error: LuthierError) -> bool:
    """Tell whether an attempt ended for what another one need not meet."""
    return isinstance(error, Unavailable | ResourceExhausted) and error.reason != Reason.OUT_OF_MEMORY


@contextmanager
def _sizes_named(evaluation: evaluation_pb2.Evaluation) -> Iterator[None]:
    """Say what an evaluation takes its memory by where there was too little."""
    try:
        yield
    except ResourceExhausted as error:
        if error.reason != Reason.OUT_OF_MEMORY:
            raise
        most_shots = max((arm.num_shots for arm in evaluation.arms), default=0)
        raise ResourceExhausted(
            f"the base model and {ROWS_A_BATCH} answers at a time must fit in memory, with max_new_tokens "
            f"{evaluation.max_new_tokens} and num_shots {most_shots} they do not; make these smaller: {error.message}",
            reason=Reason.OUT_OF_MEMORY,
            metadata={**error.metadata, "max_new_tokens": str(evaluation.max_new_tokens)},
        ) from error


def _unknown(arms: Iterable[task_pb2.ArmModel]) -> Iterator[str]:
    """Yield a warning for each tuned model that is asked as its base because nobody knows how it was taught."""
    for arm in arms:
        asked_as_base = arm.asking.template_source in _OF_THE_BASE
        if arm.HasField("adapter") and asked_as_base and not arm.arm.template:
            yield (
                f"arm {arm.arm.arm_id}: how {arm.arm.model} was taught is not known any more; it was asked with the "
                "base model's template and today's date"
            )
