"""Ask one arm all questions, a batch at a time; a record that cannot be answered fails alone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial

from luthier.errors import FailedPrecondition, Failure, InvalidArgument, Reason
from luthier.errors.status import failure_to_status, status_to_failure
from luthier.evaluation import shares
from luthier.evaluation.worker.alternatives import Alternatives, Meter
from luthier.evaluation.worker.answered import Answered
from luthier.evaluation.worker.asking import Asker, Before
from luthier.evaluation.worker.instructing import require_written
from luthier.evaluation.worker.loaded_model import LoadedModel
from luthier.evaluation.worker.order import Measured
from luthier.evaluation.worker.questions import Asked, Question, Shots, ask, failure_of
from luthier.evaluation.worker.turns import turns
from luthier.lm.generate import GenerationRequest
from luthier.lm.score import SequenceScore
from luthier.text.endings import Stops
from luthier.text.records import ChatRecord
from luthier.text.rendering import Rendered
from luthier.text.shots import with_shots
from luthier.v1 import evaluation_pb2
from luthier.work.context import TaskContext
from luthier.worker.v1 import task_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmAnswers:
    """What an arm said to every record, in row order, what it cost, and how it was asked."""

    records: Sequence[task_pb2.AnsweredRecord]
    num_prompt_tokens: int
    duration_seconds: float
    tokens_per_second: float
    template_source: evaluation_pb2.TemplateSource.ValueType
    template_digest: str
    template_date: str
    stops: Stops


@dataclass(frozen=True, slots=True, kw_only=True)
class Manner:
    """In what manner an arm is asked.

    Attributes:
        asking: with which template, and what ends an answer.
        max_new_tokens: longest answer.
        seed: of what is drawn at a temperature above 0.
        temperature: 0 for the most likely answer.
        is_measured: whether the likelihood of the right answer is measured too.
        keeps_tokens: whether answers are kept as tokens too.
        alternatives: which given texts are measured too.
    """

    asking: task_pb2.Asking
    max_new_tokens: int
    seed: int
    temperature: float = 0.0
    is_measured: bool = False
    keeps_tokens: bool = False
    alternatives: Alternatives = field(default_factory=Alternatives)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """Rows that are asked together. `texts` renders the given texts of a question that are measured."""

    arm_id: str
    rows: range
    asked: Asked
    stops: frozenset[int]
    texts: Callable[[int], Sequence[Rendered]]


class ArmRunner:
    """Asks one arm what it has not answered yet.

    Args:
        context: the task.
        loaded: the base model.
        adapter: name of the arm's adapter, None for the base model itself.
        answered: what is answered so far.
        manner: how the arm is asked.
        phase: what the arm is called in progress.
        num_answers: answers that the task will have, of all arms together.
    """

    def __init__(
        self,
        context: TaskContext,
        loaded: LoadedModel,
        adapter: str | None,
        answered: Answered,
        *,
        manner: Manner,
        phase: str,
        num_answers: int,
    ) -> None:
        self._manner = manner
        self._num_answers = num_answers
        self._context = context
        self._loaded = loaded
        self._adapter = adapter
        self._answered = answered
        self._phase = phase
        self._num_steps = 0

    def run(self, arm_id: str, questions: Sequence[Question], shots: Shots, rows: range) -> ArmAnswers:
        """Answer those of `rows` that have no answer yet, whole batches; return what the arm has said to any.

        All questions are rendered, as what their prompts begin with is read once for all of them.
        """
        began = time.monotonic()
        asking = self._manner.asking
        asker = self._loaded.asker(asking, self._context.check)
        require_written(
            arm_id,
            asking.system_prompt,
            (partial(asker.prompt_under, record=one.record, shots=shots(one)) for one in questions),
        )
        asked = ask(asker, questions, shots, measured=self._manner.is_measured)
        seconds = time.monotonic() - began
        stops = asker.stops(_asked_first(asker, asked, questions, shots))
        for first in self._answered.missing(arm_id, rows):
            together = range(first, min(first + shares.ROWS_A_BATCH, len(questions)))
            batch = _Batch(
                arm_id=arm_id,
                rows=together,
                asked=asked,
                stops=stops.token_ids,
                texts=lambda row: self._texts(asker, questions[row], shots),
            )
            self._answered.add(self._batch(batch))
        batches = self._answered.of(arm_id)
        records = [record for batch in batches for record in batch.records]
        return ArmAnswers(
            records=records,
            num_prompt_tokens=asked.num_prompt_tokens(
                record.row for record in records if not record.HasField("error")
            ),
            duration_seconds=seconds + sum(batch.duration_seconds for batch in batches),
            tokens_per_second=_tokens_per_second(batches),
            template_source=asking.template_source or evaluation_pb2.TEMPLATE_SOURCE_BASE,
            template_digest=asker.template_digest(),
            template_date=asker.template_date,
            stops=stops,
        )

    def measure(
        self, arm_id: str, references: Mapping[int, Rendered], num_rows: int
    ) -> list[task_pb2.AnsweredRecord]:
        """Return what the arm finds of given tokens, by row, where that is not known already."""
        for first in self._answered.missing(arm_id, range(num_rows)):
            began, rows = time.monotonic(), range(first, min(first + shares.ROWS_A_BATCH, num_rows))
            records = [task_pb2.AnsweredRecord(row=row) for row in rows]
            self._measure(references, [record for record in records if record.row in references])
            seconds = time.monotonic() - began
            batch = task_pb2.AnsweredBatch(
                arm_id=arm_id, first_row=first, duration_seconds=seconds, records=records
            )
            self._answered.add(batch)
        return [record for batch in self._answered.of(arm_id) for record in batch.records]

    def _batch(self, batch: _Batch) -> task_pb2.AnsweredBatch:
        began = time.monotonic()
        failures = {row: batch.asked.failures[row] for row in batch.rows if row in batch.asked.failures}
        failures |= self._unfit(batch, [row for row in batch.rows if row not in failures])
        records = {row: _failed(row, failure) for row, failure in failures.items()}
        drawing = time.monotonic()
        records |= self._generated(batch, [row for row in batch.rows if row not in records])
        drawing = time.monotonic() - drawing
        answered = [record for record in records.values() if not record.HasField("error")]
        for record in answered:
            record.num_prompt_tokens = len(batch.asked.prefix) + len(batch.asked.prompts[record.row])
        references = batch.asked.references
        measured = [record for record in answered if record.row in references]
        self._measure(references, self._within(batch, measured))
        self._measure_texts(batch, [record for record in answered if not record.HasField("error")])
        return task_pb2.AnsweredBatch(
            arm_id=batch.arm_id,
            first_row=batch.rows.start,
            duration_seconds=time.monotonic() - began,
            drawing_seconds=drawing,
            records=[records[row] for row in batch.rows],
        )

    def _unfit(self, batch: _Batch, rows: Sequence[int]) -> dict[int, Failure]:
        """Find the records that the engine would refuse, each alone, before they are asked together."""
        alone = [replace(self._request(batch, [row]), adapter=None) for row in rows]
        found = zip(rows, self._loaded.engine.unfit(alone, self._wanted), strict=True)
        return {row: failure_of(error) for row, error in found if error is not None}

    def _within(
        self, batch: _Batch, records: Sequence[task_pb2.AnsweredRecord]
    ) -> list[task_pb2.AnsweredRecord]:
        """Return those records whose references fit in the model's context: of others it has no likelihood."""
        alone = [
            replace(
                self._request(batch, [record.row]),
                prompts=(batch.asked.references[record.row].input_ids[:-1],),
                shared_prefix=(),
                max_new_tokens=1,
                adapter=None,
            )
            for record in records
        ]
        found = zip(records, self._loaded.engine.unfit(alone, self._wanted), strict=True)
        return [record for record, error in found if error is None]

    def _generated(self, batch: _Batch, rows: Sequence[int]) -> dict[int, task_pb2.AnsweredRecord]:
        """Ask rows together; when one of them makes the engine fail, halves find out which."""
        if not rows:
            return {}
        try:
            return self._together(batch, rows)
        except (InvalidArgument, FailedPrecondition) as error:
            if error.reason == Reason.LEASE_LOST:
                raise
            if len(rows) == 1:
                return {rows[0]: _failed(rows[0], failure_of(error))}
        half = len(rows) // 2
        return self._generated(batch, rows[:half]) | self._generated(batch, rows[half:])

    def _together(self, batch: _Batch, rows: Sequence[int]) -> dict[int, task_pb2.AnsweredRecord]:
        records = {row: task_pb2.AnsweredRecord(row=row) for row in rows}
        num_ended = 0
        with closing(self._loaded.engine.generate(self._request(batch, rows), self._wanted)) as events:
            for event in events:
                self._context.check()
                record = records[rows[event.row]]
                record.text += event.text
                record.num_generated_tokens += len(event.token_ids)
                if self._manner.keeps_tokens:
                    record.token_ids.extend(event.token_ids)
                if event.finish_reason is not None:
                    name = f"FINISH_REASON_{event.finish_reason}"
                    record.finish_reason = evaluation_pb2.FinishReason.Value(name)
                    num_ended += 1
                    self._show(num_ended)
        return records

    def _wanted(self) -> None:
        """Ask whether the work is wanted; a sign of life only if the engine made a step since the last time."""
        num_steps = self._loaded.engine.num_steps
        if num_steps != self._num_steps:
            self._num_steps = num_steps
            self._context.check()
        else:
            self._context.heed()

    def _request(self, batch: _Batch, rows: Sequence[int]) -> GenerationRequest:
        return GenerationRequest(
            request_id=f"{self._context.task.task}/{batch.arm_id}/{rows[0]}+{len(rows)}",
            prompts=tuple(batch.asked.prompts[row] for row in rows),
            shared_prefix=batch.asked.prefix,
            max_new_tokens=self._manner.max_new_tokens,
            adapter=self._adapter,
            stop_token_ids=batch.stops,
            temperature=self._manner.temperature,
            seed=self._manner.seed,
            first_row=rows[0],
        )

    def _show(self, num_ended: int) -> None:
        done = self._answered.num_records + num_ended
        self._context.progress(self._phase, done, self._num_answers, "answers")

    def _measure(
        self, references: Mapping[int, Rendered], records: Sequence[task_pb2.AnsweredRecord]
    ) -> None:
        """Add the log-probability of their references to records."""
        for part in turns(records, lambda record: len(references[record.row].input_ids)):
            self._context.check()
            scores = self._loaded.engine.measure(
                self._measured([references[record.row] for record in part]), self._wanted
            )
            for record, score in zip(part, scores, strict=True):
                _set_measured(record, score)

    def _texts(self, asker: Asker, question: Question, shots: Shots) -> Sequence[Rendered]:
        return self._manner.alternatives.rendered(asker, question, shots(question))

    def _measure_texts(self, batch: _Batch, records: Sequence[task_pb2.AnsweredRecord]) -> None:
        """Add to records what the arm finds of the given texts; one with which that is not possible fails alone."""
        if not self._manner.alternatives:
            return
        meter = Meter(engine=self._loaded.engine, adapter=self._adapter)
        for record in records:
            self._context.check()
            try:
                meter.add(record, batch.texts(record.row), self._wanted)
            except (InvalidArgument, FailedPrecondition) as error:
                if error.reason == Reason.LEASE_LOST:
                    raise
                record.CopyFrom(_failed(record.row, failure_of(error)))

    def _measured(self, references: Sequence[Rendered]) -> Measured:
        return Measured(
            adapter=self._adapter,
            sequences=[reference.input_ids for reference in references],
            masks=[reference.loss_mask for reference in references],
        )


def _tokens_per_second(batches: Sequence[task_pb2.AnsweredBatch]) -> float:
    """Return how fast answers were drawn, over the batches that say how long that took; 0: none does."""
    timed = [batch for batch in batches if batch.drawing_seconds > 0]
    num_tokens = sum(record.num_generated_tokens for batch in timed for record in batch.records)
    return num_tokens / sum(batch.drawing_seconds for batch in timed) if timed else 0.0


def _asked_first(asker: Asker, asked: Asked, questions: Sequence[Question], shots: Shots) -> Before:
    """Return what stands before the first answer that the template asks for."""
    position = min(asked.prompts, default=None)
    if position is None:
        return Before()
    record = asker.instructed(questions[position].record)
    return Before.answer_of(
        with_shots(record, shots(questions[position])) if isinstance(record, ChatRecord) else record
    )


def _set_measured(record: task_pb2.AnsweredRecord, score: SequenceScore) -> None:
    if math.isfinite(score.logprob):
        record.nll = -score.logprob
        record.num_reference_tokens = score.num_tokens
        return
    error = FailedPrecondition(
        f"the reference's log-probability must be a finite number, got {score.logprob}; the model's weights or its "
        "adapter are broken",
        reason=Reason.MODEL_INVALID,
    )
    record.CopyFrom(_failed(record.row, failure_of(error)))


def _failed(row: int, failure: Failure) -> task_pb2.AnsweredRecord:
    return task_pb2.AnsweredRecord(row=row, error=failure_to_status(failure))


def require_an_answer(
    arm_id: str, records: Sequence[task_pb2.AnsweredRecord], questions: Sequence[Question]
) -> None:
    """Raise with the reason of the first record where an arm could answer none of all."""
    if any(not record.HasField("error") for record in records):
        return
    first = status_to_failure(records[0].error)
    place = questions[0].place
    message = (
        f"arm {arm_id} could answer none of {len(records):,} records; the first, {place}: {first.message}"
    )
    raise replace(first, message=message).to_error()
