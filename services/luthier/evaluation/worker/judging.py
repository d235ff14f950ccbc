"""Judges, asked once all arms have answered: models in memory or endpoints, whose answers are kept as those of arms."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from luthier.errors import LuthierError, Reason, Unavailable
from luthier.errors.status import failure_to_status
from luthier.evaluation import shares
from luthier.evaluation.judgements import judgements_a_record
from luthier.evaluation.worker.answered import Answered
from luthier.evaluation.worker.arm import ArmRunner, Manner
from luthier.evaluation.worker.judged import Item, JudgeCost, Judged, judged_by
from luthier.evaluation.worker.loaded_model import LoadedModel
from luthier.evaluation.worker.questions import Question, failure_of, no_shots
from luthier.evaluation.worker.spending import Spending
from luthier.grading.judging import Matter, pairwise_prompt, rubric_prompt
from luthier.text.records import ChatRecord, Message, SingleRecord
from luthier.text.rendering import reference_text
from luthier.v1.evaluation_pb2 import FINISH_REASON_LENGTH, FINISH_REASON_STOP, Evaluation
from luthier.v1.judge_pb2 import Judge
from luthier.work.context import TaskContext
from luthier.work.judge_access import JudgeAccess, Target
from luthier.work.judge_calls import CALLS_AT_ONCE, JudgeAnswer, JudgeCalls
from luthier.worker.v1 import task_pb2

Records = Sequence[task_pb2.AnsweredRecord]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Endpoint:
    """An endpoint that is allowed, and the key that it is sent."""

    target: Target
    key: str


class Judging:
    """Asks the judges of an evaluation.

    Args:
        context: the task.
        answered: what is answered so far, by judges too.
        evaluation: which has judges.
        questions: what was asked.
        access: which endpoints may be asked.

    Raises:
        InvalidArgument: ADDRESS_NOT_ALLOWED, KEY_NOT_ALLOWED, by this worker.
        FailedPrecondition: KEY_UNREADABLE.
    """

    def __init__(
        self,
        context: TaskContext,
        answered: Answered,
        evaluation: Evaluation,
        questions: Sequence[Question],
        access: JudgeAccess,
    ) -> None:
        self._context = context
        self._answered = answered
        self._evaluation = evaluation
        self._questions = questions
        # Before arms work for hours whose answers nobody could judge.
        self._endpoints = {
            judge.judge_id: _Endpoint(
                target=access.require(judge.endpoint, f"judges[{index}].endpoint"),
                key=access.key(judge.endpoint),
            )
            for index, judge in enumerate(evaluation.judges)
            if judge.HasField("endpoint")
        }
        self._num_all = 0
        self._costs: dict[str, JudgeCost] = {}
        self._items: dict[str, list[Item]] = {}
        self.num_answers = sum(self._most_items(judge) for judge in evaluation.judges)

    @property
    def endpoint_seconds(self) -> float:
        """The longest that all endpoints can take together."""
        return sum(
            self._most_items(judge) * judge.endpoint.timeout_seconds / CALLS_AT_ONCE
            for judge in self._evaluation.judges
            if judge.HasField("endpoint")
        )

    def begin(self, answers: Mapping[str, Records], num_all: int) -> None:
        """Take what the arms said; `num_all` are the answers that the task has at most."""
        # What judges say is of these very answers, and must not be found by an attempt that lacks them.
        self._answered.commit()
        self._num_all = num_all
        self._items = {judge.judge_id: list(self._of(judge, answers)) for judge in self._evaluation.judges}

    def ask_endpoints(self) -> None:
        """Ask the judges that are no models of ours.

        Raises Unavailable JUDGE_UNAVAILABLE where one is away: the attempt is made again after a while, a few times.
        """
        for judge in self._evaluation.judges:
            if judge.HasField("endpoint"):
                self._ask_endpoint(judge, self._endpoints[judge.judge_id])

    def ask_model(self, loaded: LoadedModel, arm: task_pb2.ArmModel, adapter: str | None) -> None:
        """Ask a judge that is a model in memory."""
        judge = next(one for one in self._evaluation.judges if one.judge_id == arm.arm.arm_id)
        items = self._items[judge.judge_id]
        runner = ArmRunner(
            self._context,
            loaded,
            adapter,
            self._answered,
            manner=Manner(asking=arm.asking, max_new_tokens=judge.max_new_tokens, seed=self._evaluation.seed),
            phase=_phase(judge),
            num_answers=self._num_all,
        )
        if items:
            said = runner.run(_key(judge), _questions(items), no_shots, range(len(items)))
            self._costs[judge.judge_id] = JudgeCost(
                spent=task_pb2.JudgeSpending(
                    num_prompt_tokens=said.num_prompt_tokens,
                    num_generated_tokens=sum(record.num_generated_tokens for record in said.records),
                )
            )

    def judged(self) -> Judged:
        """Return what came of it."""
        parts = []
        for judge in self._evaluation.judges:
            records = [record for batch in self._answered.of(_key(judge)) for record in batch.records]
            cost = self._costs.get(judge.judge_id, JudgeCost())
            parts.append(judged_by(judge, self._items[judge.judge_id], records, cost))
        return Judged.joined(parts)

    def _most_items(self, judge: Judge) -> int:
        return judgements_a_record(judge, len(self._evaluation.arms)) * len(self._questions)

    def _ask_endpoint(self, judge: Judge, endpoint: _Endpoint) -> None:
        items = self._items[judge.judge_id]
        calls = JudgeCalls(judge.endpoint, endpoint.target, endpoint.key, judge.max_new_tokens)
        spending = Spending(self._answered, f"{_key(judge)}/calls", judge.endpoint.max_calls)
        for first in self._answered.missing(_key(judge), range(len(items))):
            began = time.monotonic()
            rows = range(first, min(first + shares.ROWS_A_BATCH, len(items)))
            self._context.progress(_phase(judge), self._answered.num_records, self._num_all, "answers")
            try:
                said = spending.asked(calls, [items[row].prompt for row in rows], self._context.check)
            except Unavailable as error:
                # The next attempt asks on from here, and pays for nothing twice that was committed.
                if error.reason == Reason.JUDGE_UNAVAILABLE:
                    self._answered.commit()
                raise
            batch = task_pb2.AnsweredBatch(
                arm_id=_key(judge),
                first_row=first,
                duration_seconds=time.monotonic() - began,
                records=[_record(row, one) for row, one in zip(rows, said, strict=True)],
            )
            self._answered.add(batch)
        self._costs[judge.judge_id] = JudgeCost(num_repeated_calls=calls.num_repeated, spent=spending.total)

    def _of(self, judge: Judge, answers: Mapping[str, Records]) -> Iterator[Item]:
        """Yield what a judge is asked: the two orders of a pair beside each other."""
        given = {
            arm_id: {record.row: record.text for record in said if not record.HasField("error")}
            for arm_id, said in answers.items()
        }
        matters = [_matter(judge, question.record) for question in self._questions]
        if judge.HasField("rubric"):
            for arm_id, texts in given.items():
                yield from _singles(judge, arm_id, texts, matters)
            return
        mine = judge.pairwise.arm_id
        for rival in (arm_id for arm_id in given if arm_id != mine):
            yield from _pairs((mine, rival), given, matters)


def _singles(
    judge: Judge, arm_id: str, texts: Mapping[int, str], matters: Sequence[Matter]
) -> Iterator[Item]:
    least, most = judge.rubric.least, judge.rubric.most
    for row, matter in enumerate(matters):
        if row in texts:
            prompt = rubric_prompt(matter, texts[row], least, most)
            yield Item(row=row, arm_id=arm_id, prompt=prompt)


def _pairs(
    arms: tuple[str, str], given: Mapping[str, Mapping[int, str]], matters: Sequence[Matter]
) -> Iterator[Item]:
    """Yield two items, one in each order, for each record that both arms have answered."""
    for row, matter in enumerate(matters):
        if not all(row in given[arm_id] for arm_id in arms):
            continue
        for first, second in (arms, arms[::-1]):
            prompt = pairwise_prompt(matter, given[first][row], given[second][row])
            yield Item(row=row, arm_id=first, rival_arm_id=second, prompt=prompt)


def _key(judge: Judge) -> str:
    """Return under which name its answers are kept: none that an arm may have."""
    return f"judge/{judge.judge_id}"


def _phase(judge: Judge) -> str:
    return f"judge {judge.judge_id}"


def _matter(judge: Judge, record: SingleRecord) -> Matter:
    if isinstance(record, ChatRecord):
        request = "\n\n".join(f"{turn.role}: {turn.content}" for turn in record.messages[:-1])
    else:
        request = record.prompt
    reference = None if judge.hides_reference else reference_text(record)
    return Matter(criteria=judge.criteria, request=request, reference=reference)


def _questions(items: Sequence[Item]) -> list[Question]:
    return [
        Question(
            record_id=hashlib.sha256(item.prompt.encode("utf-8", "surrogatepass")).hexdigest(),
            row=row,
            record=ChatRecord(
                messages=(Message(role="user", content=item.prompt), Message(role="assistant", content=""))
            ),
            filename="judgements",
            line=row + 1,
        )
        for row, item in enumerate(items)
    ]


def _record(row: int, said: JudgeAnswer | LuthierError) -> task_pb2.AnsweredRecord:
    if isinstance(said, JudgeAnswer):
        reason = FINISH_REASON_LENGTH if said.is_cut else FINISH_REASON_STOP
        return task_pb2.AnsweredRecord(row=row, text=said.text, finish_reason=reason)
    return task_pb2.AnsweredRecord(row=row, error=failure_to_status(failure_of(said)))
