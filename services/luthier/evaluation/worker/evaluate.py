"""Run one evaluation: the same questions to every arm, then scores, intervals and comparisons."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

from luthier.errors import FailedPrecondition, InvalidArgument, Reason
from luthier.evaluation.evaluations.prediction_file import write_predictions
from luthier.evaluation.metrics.scores import score_answer
from luthier.evaluation.worker.models import LoadedModel, Models
from luthier.evaluation.worker.questions import Asked, Question, ask, choose
from luthier.evaluation.worker.scoring import Answer, compare, estimates
from luthier.lm.generate import GenerationEvent, GenerationRequest
from luthier.lm.lora import use_adapter
from luthier.lm.scoring import SequenceScore, sequence_logprobs
from luthier.text.records import ChatRecord, Record, record_from_json
from luthier.text.rendering import Rendered, reference_text
from luthier.v1 import chat_pb2, data_service_pb2, data_service_pb2_grpc, dataset_pb2, evaluation_pb2
from luthier.work.arrow_stream import read_batches
from luthier.work.context import TaskContext
from luthier.work.peers import bearer, channel
from luthier.worker.v1 import task_pb2

ROWS_A_BATCH = 64
TOKENS_A_TURN = 2048
"""Tokens of references measured before interactive requests have their turn."""
_READ_SECONDS = 600.0
_SHOT_SEED_OFFSET = 1


class Evaluator:
    """The runner of EVALUATE tasks.

    Args:
        data_address: host:port of the Data service.
        models: the models in memory.
    """

    def __init__(self, data_address: str, models: Models) -> None:
        self._channel = channel(data_address)
        self._data = data_service_pb2_grpc.DataServiceStub(self._channel)
        self._models = models

    def __call__(self, context: TaskContext) -> task_pb2.TaskResult:
        """Run the evaluation of a task.

        Raises:
            LuthierError: why it failed.
        """
        spec = context.task.evaluate
        evaluation = spec.evaluation
        context.progress("loading", 0, 0, "arms")
        questions = choose(self._read(context, evaluation.split), evaluation.max_records, evaluation.seed)
        _check_references(_text_metrics(evaluation), questions)
        shots = self._shots(context, evaluation)
        answers: dict[str, list[Answer]] = {}
        results = []
        with self._models.base(spec.base_model, context.token, context.check) as loaded:
            for number, arm in enumerate(spec.arms):
                adapter = arm.adapter if arm.HasField("adapter") else None
                examples = shots[: arm.arm.num_shots]
                with self._models.adapter(loaded, adapter, context.token) as name:
                    runner = _ArmRunner(context, loaded, name, arm.asking, number, len(spec.arms))
                    result, said = runner.run(arm.arm.arm_id, questions, examples)
                results.append(result)
                answers[arm.arm.arm_id] = said
        return self._result(context, questions, results, answers)

    def close(self) -> None:
        """Hang up."""
        self._channel.close()

    def _read(self, context: TaskContext, split: dataset_pb2.Split.ValueType) -> list[Question]:
        name = context.task.evaluate.evaluation.dataset_version

        def open_at(row: int) -> Iterator[object]:
            request = data_service_pb2.ReadRecordsRequest(name=name, split=split, start_row=row)
            return self._data.ReadRecords(request, metadata=bearer(context.token), timeout=_READ_SECONDS)

        questions = []
        for batch in read_batches(open_at):  # type: ignore[arg-type]
            rows = zip(
                batch.column("row").to_pylist(),
                batch.column("record_id").to_pylist(),
                batch.column("record").to_pylist(),
                strict=True,
            )
            for row, record_id, text in rows:
                record = record_from_json(text)
                questions.append(Question(row=row, record_id=record_id, record=record))
        return questions

    def _shots(self, context: TaskContext, evaluation: evaluation_pb2.Evaluation) -> list[Record]:
        wanted = max((arm.num_shots for arm in evaluation.arms), default=0)
        if wanted == 0:
            return []
        pool = self._read(context, dataset_pb2.SPLIT_TRAIN)
        if len(pool) < wanted:
            raise FailedPrecondition(
                f"an arm wants {wanted} examples, the train split has {len(pool)} records",
                reason=Reason.WRONG_STATE,
            )
        chosen = choose(pool, wanted, evaluation.seed + _SHOT_SEED_OFFSET)
        return [question.record for question in chosen]

    def _result(
        self,
        context: TaskContext,
        questions: Sequence[Question],
        results: Sequence[evaluation_pb2.ArmResult],
        answers: dict[str, list[Answer]],
    ) -> task_pb2.TaskResult:
        seed = context.task.evaluate.evaluation.seed
        arms = list(answers)
        comparisons = [
            one
            for later, candidate in enumerate(arms)
            for baseline in arms[:later]
            for one in compare(candidate, answers[candidate], baseline, answers[baseline], seed)
        ]
        path = context.scratch / "predictions"
        predictions = (
            _prediction(row, question, {arm: answers[arm][row] for arm in arms})
            for row, question in enumerate(questions)
        )
        write_predictions(path, (one.SerializeToString(deterministic=True) for one in predictions))
        outcome = task_pb2.EvaluateResult(
            arm_results=results,
            comparisons=comparisons,
            num_records=len(questions),
            predictions=context.store(path, "predictions"),
        )
        return task_pb2.TaskResult(evaluate=outcome)


@dataclass(slots=True)
class _Said:
    """What an arm has said so far, by row; a reason stands where a row has ended."""

    texts: list[str]
    reasons: list[str]
    num_tokens: int = 0


class _ArmRunner:
    """Asks one arm all questions."""

    def __init__(
        self,
        context: TaskContext,
        loaded: LoadedModel,
        adapter: str | None,
        asking: task_pb2.Asking,
        number: int,
        total: int,
    ) -> None:
        self._context = context
        self._loaded = loaded
        self._adapter = adapter
        self._asking = asking
        self._number = number
        self._total = total
        self._evaluation = context.task.evaluate.evaluation

    def run(
        self, arm_id: str, questions: Sequence[Question], shots: Sequence[Record]
    ) -> tuple[evaluation_pb2.ArmResult, list[Answer]]:
        began = time.monotonic()
        asker = self._loaded.asker(self._asking, self._context.check)
        asked = ask(asker, questions, shots)
        stops = asker.stop_token_ids() | self._loaded.eos_token_ids
        texts, reasons, num_generated = self._generate(arm_id, asked, stops, len(questions))
        measuring = evaluation_pb2.EVALUATION_METRIC_PERPLEXITY in self._evaluation.metrics
        references = self._references(asked) if measuring else None
        wanted = _text_metrics(self._evaluation)
        answers = []
        for row, question in enumerate(questions):
            measured = references[row] if references is not None else SequenceScore(logprob=0.0, num_tokens=0)
            answers.append(
                Answer(
                    text=texts[row],
                    finish_reason=reasons[row],
                    scores=score_answer(wanted, texts[row], reference_text(question.record)),
                    nll=-measured.logprob,
                    num_tokens=measured.num_tokens,
                )
            )
        result = evaluation_pb2.ArmResult(
            arm_id=arm_id,
            scores=estimates(answers, self._evaluation.seed),
            num_generated_tokens=num_generated,
            num_prompt_tokens=asked.num_prompt_tokens,
            duration_seconds=time.monotonic() - began,
            num_cut=sum(reason == "LENGTH" for reason in reasons),
            template_source=self._asking.template_source or evaluation_pb2.TEMPLATE_SOURCE_BASE,
            template_digest=asker.template_digest(),
            template_date=asker.template_date,
        )
        return result, answers

    def _generate(
        self, arm_id: str, asked: Asked, stops: frozenset[int], count: int
    ) -> tuple[list[str], list[str], int]:
        said = _Said(texts=[""] * count, reasons=[""] * count)
        for first in range(0, count, ROWS_A_BATCH):
            request = GenerationRequest(
                request_id=f"{self._context.task.task}/{arm_id}/{first}",
                prompts=asked.prompts[first : first + ROWS_A_BATCH],
                shared_prefix=asked.prefix,
                max_new_tokens=self._evaluation.max_new_tokens,
                adapter=self._adapter,
                stop_token_ids=stops,
                seed=self._evaluation.seed,
                first_row=first,
            )
            with closing(self._loaded.thread.generate(request, self._context.check)) as events:
                self._collect(arm_id, events, first, said)
        return said.texts, said.reasons, said.num_tokens

    def _collect(self, arm_id: str, events: Iterator[GenerationEvent], first: int, said: _Said) -> None:
        for event in events:
            said.texts[first + event.row] += event.text
            said.num_tokens += len(event.token_ids)
            if event.finish_reason is not None:
                said.reasons[first + event.row] = event.finish_reason
                self._show(arm_id, sum(map(bool, said.reasons)), len(said.texts))

    def _show(self, arm_id: str, done: int, count: int) -> None:
        phase = f"arm {arm_id}, {self._number + 1} of {self._total}"
        self._context.progress(phase, self._number * count + done, self._total * count, "answers")

    def _references(self, asked: Asked) -> list[SequenceScore]:
        scores: list[SequenceScore] = []
        for part in _turns(asked.answers):
            self._context.check()
            scores += self._loaded.thread.run(lambda part=part: self._measured(part))  # type: ignore[misc]
        return scores

    def _measured(self, answers: Sequence[Rendered]) -> list[SequenceScore]:
        ids = [answer.input_ids for answer in answers]
        masks = [answer.loss_mask for answer in answers]
        with use_adapter(self._loaded.model, self._adapter):
            return sequence_logprobs(self._loaded.model, ids, masks)


def _turns(answers: Sequence[Rendered]) -> Iterator[list[Rendered]]:
    """Cut answers into parts of at most `TOKENS_A_TURN` tokens, or of one answer that is longer."""
    part: list[Rendered] = []
    for answer in answers:
        if part and sum(len(one.input_ids) for one in (*part, answer)) > TOKENS_A_TURN:
            yield part
            part = []
        part.append(answer)
    if part:
        yield part


def _text_metrics(evaluation: evaluation_pb2.Evaluation) -> list[str]:
    names = [evaluation_pb2.EvaluationMetric.Name(metric) for metric in evaluation.metrics]
    metrics = [name.removeprefix("EVALUATION_METRIC_") for name in names]
    return [metric for metric in metrics if metric != "PERPLEXITY"]


def _check_references(metrics: Sequence[str], questions: Sequence[Question]) -> None:
    """Find a reference that does not suit a metric before the models do hours of work for nothing."""
    for question in questions:
        reference = reference_text(question.record)
        try:
            score_answer(metrics, reference, reference)
        except ValueError as error:
            raise InvalidArgument(f"row {question.row}: {error}", reason=Reason.INVALID_RECORDS) from error


def _prediction(row: int, question: Question, said: dict[str, Answer]) -> evaluation_pb2.Prediction:
    record = question.record
    if isinstance(record, ChatRecord):
        turns = [
            chat_pb2.ChatMessage(role=message.role, content=message.content)
            for message in record.messages[:-1]
        ]
    else:
        turns = [chat_pb2.ChatMessage(role="user", content=record.prompt)]
    answers = [
        evaluation_pb2.ArmPrediction(
            arm_id=arm_id,
            text=answer.text,
            finish_reason=evaluation_pb2.FinishReason.Value(f"FINISH_REASON_{answer.finish_reason}"),
            scores=answer.scores,
        )
        for arm_id, answer in said.items()
    ]
    return evaluation_pb2.Prediction(
        row=row,
        record_id=question.record_id,
        prompt=turns,
        reference=reference_text(record),
        answers=answers,
    )
