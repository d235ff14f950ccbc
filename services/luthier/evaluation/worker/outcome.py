"""From what the arms said to an evaluation's outcome: results, comparisons, warnings, and the file of predictions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from luthier.evaluation.worker.arm import ArmAnswers
from luthier.evaluation.worker.assessing import NOT_ASSESSED, Assessed
from luthier.evaluation.worker.comparing import comparisons_of
from luthier.evaluation.worker.contamination import Learnt, clean_answers, scored_apart, warnings_of
from luthier.evaluation.worker.questions import Question
from luthier.evaluation.worker.references import Grading
from luthier.evaluation.worker.scoring import Answer, estimates
from luthier.evaluation.worker.uncompared import LeftOut, uncompared
from luthier.grading.graded_scores import scores_of
from luthier.text.records import ChatRecord
from luthier.text.rendering import reference_text
from luthier.v1 import chat_pb2, evaluation_pb2
from luthier.work.row_file import write_rows
from luthier.worker.v1 import task_pb2


def result_of(
    evaluation: evaluation_pb2.Evaluation,
    grading: Grading,
    questions: Sequence[Question],
    answers: Mapping[str, ArmAnswers],
    assessed: Assessed,
    learnt: Learnt | None,
    path: Path,
) -> task_pb2.EvaluateResult:
    """Return the outcome of an evaluation, less its `predictions`, which are written to `path`.

    `assessed` is what judges and graders said. `learnt` are the records that tuned models learnt from: they count in no
    comparison. None: nobody looked.
    """
    scored = {arm_id: _scored(arm_id, said, questions, grading, assessed) for arm_id, said in answers.items()}
    arms, named = list(answers), scores_of(evaluation.graders)
    held = learnt.held if learnt else {}
    said = {arm_id: answers[arm_id].records for arm_id in arms}
    failures = [warning for arm_id in arms for warning in _warning(arm_id, answers[arm_id], questions)]
    apart = scored_apart(learnt, scored, named) if learnt else None
    learnt_warnings = warnings_of(apart, len(questions)) if apart else ()
    unread = [one for arm_id in arms for one in _unread(arm_id, answers[arm_id])] if grading.ratios else []
    unknown = [warning for arm_id in arms for warning in _unknown_ending(arm_id, answers[arm_id])]
    comparisons = comparisons_of(evaluation, clean_answers(scored, held))
    failed = {arm_id: _failed_rows(answers[arm_id]) for arm_id in arms}
    left_out = LeftOut(learnt=held.keys(), failed=failed)
    apart_from = uncompared(evaluation, comparisons, left_out, len(questions))
    return task_pb2.EvaluateResult(
        arm_results=[
            _arm_result(arm_id, answers[arm_id], estimates(scored[arm_id], named)) for arm_id in arms
        ],
        comparisons=comparisons,
        num_records=write_answers(grading, questions, said, path, range(len(questions)), assessed),
        warnings=[
            *failures,
            *unknown,
            *grading.warnings,
            *assessed.warnings,
            *learnt_warnings,
            *apart_from,
            *unread,
        ],
        contamination=apart,
        judge_results=assessed.judged.results,
        grader_results=assessed.graded.results,
    )


def write_answers(
    grading: Grading,
    questions: Sequence[Question],
    said: Mapping[str, Sequence[task_pb2.AnsweredRecord]],
    path: Path,
    rows: range,
    assessed: Assessed = NOT_ASSESSED,
) -> int:
    """Write what the arms said to some records, as far as they came, as a file of predictions; return their number."""
    by_row = {arm_id: {record.row: record for record in records} for arm_id, records in said.items()}
    predictions = (
        _prediction(
            row,
            questions[row],
            {arm_id: found[row] for arm_id, found in by_row.items() if row in found},
            grading,
            assessed,
        )
        for row in rows
    )
    return write_rows(path, (one.SerializeToString(deterministic=True) for one in predictions))


def _scored(
    arm_id: str, said: ArmAnswers, questions: Sequence[Question], grading: Grading, assessed: Assessed
) -> list[Answer]:
    """A record that failed has no score: it counts in nothing."""
    return [
        Answer(
            text=record.text,
            finish_reason=evaluation_pb2.FinishReason.Name(record.finish_reason),
            scores={**_scores(record, question, grading), **assessed.scores(arm_id, record.row)},
            points=assessed.judged.points.get((arm_id, record.row), {}),
            nll=record.nll,
            num_tokens=record.num_reference_tokens if "PERPLEXITY" in grading.ratios else 0,
            num_bytes=_num_bytes(record, question) if "BITS_PER_BYTE" in grading.ratios else 0,
            failed=record.HasField("error"),
        )
        for record, question in zip(said.records, questions, strict=True)
    ]


def _scores(record: task_pb2.AnsweredRecord, question: Question, grading: Grading) -> Mapping[str, float]:
    return {} if record.HasField("error") else grading.scores(record, question)


def _num_bytes(record: task_pb2.AnsweredRecord, question: Question) -> int:
    return len(reference_text(question.record).encode()) if record.num_reference_tokens else 0


def _arm_result(
    arm_id: str, said: ArmAnswers, scores: Sequence[evaluation_pb2.ScoreEstimate]
) -> evaluation_pb2.ArmResult:
    return evaluation_pb2.ArmResult(
        arm_id=arm_id,
        scores=scores,
        num_generated_tokens=sum(record.num_generated_tokens for record in said.records),
        num_prompt_tokens=said.num_prompt_tokens,
        duration_seconds=said.duration_seconds,
        num_cut=sum(record.finish_reason == evaluation_pb2.FINISH_REASON_LENGTH for record in said.records),
        template_source=said.template_source,
        template_digest=said.template_digest,
        template_date=said.template_date,
        num_errors=sum(record.HasField("error") for record in said.records),
        tokens_per_second=said.tokens_per_second,
    )


def _unknown_ending(arm_id: str, said: ArmAnswers) -> Iterator[str]:
    if said.stops.unknown:
        yield (
            f"arm {arm_id}: how its chat template ends a turn is not known, as it takes no conversation that ends with "
            f"an answer; answers end at the tokens {sorted(said.stops.token_ids)} or are cut: {said.stops.unknown}"
        )


def _unread(arm_id: str, said: ArmAnswers) -> Iterator[str]:
    unread = [one for one in said.records if not one.HasField("error") and not one.num_reference_tokens]
    if unread:
        yield (
            f"arm {arm_id}: {len(unread):,} of {len(said.records):,} references have no token or do not fit in the "
            f"model's context, and count in no likelihood; the first is that of record {unread[0].row}"
        )


def _failed_rows(said: ArmAnswers) -> set[int]:
    return {record.row for record in said.records if record.HasField("error")}


def _warning(arm_id: str, said: ArmAnswers, questions: Sequence[Question]) -> list[str]:
    failed = [record for record in said.records if record.HasField("error")]
    if not failed:
        return []
    first = failed[0]
    return [
        f"arm {arm_id} could not answer {len(failed):,} of {len(said.records):,} records, which count in none of its "
        f"scores; the first, {questions[first.row].place}: {first.error.message}"
    ]


def _prediction(
    row: int,
    question: Question,
    said: Mapping[str, task_pb2.AnsweredRecord],
    grading: Grading,
    assessed: Assessed,
) -> evaluation_pb2.Prediction:
    record = question.record
    if isinstance(record, ChatRecord):
        turns = [
            chat_pb2.ChatMessage(role=message.role, content=message.content)
            for message in record.messages[:-1]
        ]
    else:
        turns = [chat_pb2.ChatMessage(role="user", content=record.prompt)]
    prediction = evaluation_pb2.Prediction(
        row=row,
        record_id=question.record_id,
        prompt=turns,
        reference=reference_text(record),
        filename=question.filename,
        line=question.line,
        judgements=assessed.judged.judgements.get(row, ()),
    )
    for arm_id, found in said.items():
        answer = prediction.answers.add(
            arm_id=arm_id,
            text=found.text,
            finish_reason=found.finish_reason,
            scores={**_scores(found, question, grading), **assessed.scores(arm_id, row)},
        )
        if found.HasField("error"):
            answer.error.CopyFrom(found.error)
        for name, grade in assessed.graded.of(arm_id, row).items():
            answer.grades[name].CopyFrom(grade)
    return prediction
