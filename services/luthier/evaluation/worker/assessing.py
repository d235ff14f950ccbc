"""What is asked once all arms have answered, by whoever scores: reward models, graders, and judges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from luthier.evaluation.access import Access
from luthier.evaluation.bases import side_by_side
from luthier.evaluation.precision import precision_of
from luthier.evaluation.worker.answered import Answered
from luthier.evaluation.worker.arm import ArmAnswers
from luthier.evaluation.worker.graded import NOTHING_GRADED, Graded
from luthier.evaluation.worker.graders import Graders
from luthier.evaluation.worker.judged import NOBODY_JUDGED, Judged
from luthier.evaluation.worker.judging import Judging
from luthier.evaluation.worker.loaded_model import LoadedModel
from luthier.evaluation.worker.models import Models
from luthier.evaluation.worker.questions import Question
from luthier.evaluation.worker.rewards import Rewards, set_rewards
from luthier.evaluation.worker.wanted import Wanted, spec_of
from luthier.work.context import TaskContext
from luthier.work.limited_pool import LimitedPool
from luthier.work.limits import answering_seconds
from luthier.worker.v1 import task_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class Assessed:
    """What came of judges and of graders, and what people should know of reward models."""

    judged: Judged = field(default_factory=lambda: NOBODY_JUDGED)
    graded: Graded = field(default_factory=lambda: NOTHING_GRADED)
    reward_warnings: Sequence[str] = ()

    def scores(self, arm_id: str, row: int) -> dict[str, float]:
        """Return the scores of an arm's answer."""
        return {**self.judged.scores.get((arm_id, row), {}), **self.graded.scores(arm_id, row)}

    @property
    def warnings(self) -> list[str]:
        """What people should know."""
        return [*self.judged.warnings, *self.graded.warnings, *self.reward_warnings]


NOT_ASSESSED = Assessed()


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """What assessing takes: models in memory, who may be asked outside, and processes that grade."""

    models: Models
    access: Access
    pool: LimitedPool


class Assessing:
    """Asks the reward models, the graders and the judges of an evaluation; of a share nobody does.

    Args:
        context: the task.
        answered: what is answered so far, by them too.
        questions: what was asked.
        wanted: what the task wants; it is told of answers of judges.
        means: what it takes.

    Raises:
        LuthierError: as `Judging` and `Graders`, before any arm has been asked.
    """

    def __init__(
        self,
        context: TaskContext,
        answered: Answered,
        questions: Sequence[Question],
        wanted: Wanted,
        means: Means,
    ) -> None:
        self._context = context
        self._wanted = wanted
        self._models = means.models
        self._judging: Judging | None = None
        self._graders: Graders | None = None
        self._rewards: Rewards | None = None
        evaluation = spec_of(context.task).evaluation
        if wanted.is_share:
            return
        if evaluation.judges:
            judging = Judging(context, answered, evaluation, questions, means.access.judges)
            wanted.expect(judging.num_answers)
            most_tokens = max(judge.max_new_tokens for judge in evaluation.judges)
            context.announce(answering_seconds(judging.num_answers, most_tokens) + judging.endpoint_seconds)
            self._judging = judging
        if spec_of(context.task).reward_models:
            self._rewards = Rewards(context, answered, means.models, questions)
            context.announce(self._rewards.seconds)
        if evaluation.graders:
            self._graders = Graders(
                context, answered, evaluation, questions, means.access.rewards, means.pool
            )
            context.announce(self._graders.seconds)

    def assessed(self, answers: Mapping[str, ArmAnswers]) -> Assessed:
        """Have what the arms said valued, graded and judged; the metric's reward is set in what they said."""
        records = {arm_id: said.records for arm_id, said in answers.items()}
        values = self._rewards.valued(records) if self._rewards else {}
        metric = self._rewards.metric if self._rewards else ""
        return Assessed(
            graded=self._graders.graded(records, values) if self._graders else NOTHING_GRADED,
            judged=self._judged(self._judging, records) if self._judging else NOBODY_JUDGED,
            reward_warnings=tuple(set_rewards(metric, values[metric], records)) if metric else (),
        )

    def _judged(self, judging: Judging, answers: Mapping[str, Sequence[task_pb2.AnsweredRecord]]) -> Judged:
        """Have all judges judge what the arms said; models one base after the other, as arms are."""
        context, wanted, spec = self._context, self._wanted, spec_of(self._context.task)
        judging.begin(answers, wanted.num_all)
        judging.ask_endpoints()
        precision = precision_of(spec.evaluation.base_precision)
        for judges in side_by_side(spec.judges, wanted.base_of):
            base = wanted.base(judges[0])
            with self._models.base(
                base, lambda: context.token, context.check, precision=precision, log=context.log
            ) as loaded:
                self._ask_judges(loaded, judges, judging)
        return judging.judged()

    def _ask_judges(self, loaded: LoadedModel, judges: Sequence[task_pb2.ArmModel], judging: Judging) -> None:
        context = self._context
        for judge in judges:
            adapter = judge.adapter if judge.HasField("adapter") else None
            with self._models.adapter(loaded, adapter, lambda: context.token, context.check) as name:
                judging.ask_model(loaded, judge, name)
