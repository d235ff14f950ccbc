"""Records of an evaluation that its tuned models learnt from: found in their training versions, and scored apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.evaluation.worker.overlap import Held, Kind, Overlaps, Place, Words
from luthier.evaluation.worker.questions import Question
from luthier.evaluation.worker.scoring import Answer, estimates
from luthier.grading.graded_scores import NameScore
from luthier.grading.metrics.scores import score_named
from luthier.text.records import ChatRecord, CompletionRecord, Record, SingleRecord, record_from_json
from luthier.text.rendering import reference_text
from luthier.text.units import chosen_record
from luthier.v1 import data_service_pb2, data_service_pb2_grpc, dataset_pb2, evaluation_pb2
from luthier.work.arrow_stream import read_batches
from luthier.work.context import TaskContext
from luthier.work.peers import bearer, channel
from luthier.work.pinned import require_pinned
from luthier.work.retry import asked
from luthier.worker.v1 import task_pb2

MAX_LISTED = 1000
_CALL_SECONDS = 30.0
_READ_SECONDS = 3600.0
_COLUMNS = ("record_id", "filename", "line", "record")


@dataclass(frozen=True, slots=True, kw_only=True)
class Learnt:
    """Records of an evaluation that its tuned models learnt from: counted and listed, and by row."""

    counts: evaluation_pb2.Contamination
    held: Mapping[int, Held]


class TrainingRecords:
    """The train splits of dataset versions at the Data service.

    Args:
        data_address: host:port of the Data service.
    """

    def __init__(self, data_address: str) -> None:
        self._channel = channel(data_address)
        self._data = data_service_pb2_grpc.DataServiceStub(self._channel)

    def look_up(self, context: TaskContext, questions: Sequence[Question]) -> Learnt | None:
        """Return which questions the task's training versions hold; None where it has no tuned model.

        Raises:
            DataLoss: a version's name means another one by now.
            LuthierError: the Data service refused, or stayed away.
        """
        spec = context.task.evaluate
        if not spec.training_versions and not spec.unknown_models:
            return None
        overlaps = Overlaps([_words(question.record_id, question.record) for question in questions])
        num_read = 0
        for version in spec.training_versions:
            for place, words in self._records(context, version):
                overlaps.show(words, place)
                num_read += 1
        found = evaluation_pb2.Contamination(
            versions=[version.name for version in spec.training_versions],
            unknown_models=spec.unknown_models,
            num_training_records=num_read,
        )
        return Learnt(counts=_counted(found, questions, overlaps.held), held=overlaps.held)

    def close(self) -> None:
        """Hang up."""
        self._channel.close()

    def _records(
        self, context: TaskContext, version: task_pb2.TrainingVersion
    ) -> Iterator[tuple[Place, Words]]:
        def open_at(start_row: int) -> Any:
            # Each time, for streams break and versions go.
            self._require_pinned(context, version)
            request = data_service_pb2.ReadRecordsRequest(
                name=version.name, split=dataset_pb2.SPLIT_TRAIN, start_row=start_row
            )
            return self._data.ReadRecords(request, metadata=bearer(context.token), timeout=_READ_SECONDS)

        for batch in read_batches(open_at, context.check):
            columns = [batch.column(column).to_pylist() for column in _COLUMNS]
            for record_id, filename, line, text in zip(*columns, strict=True):
                place = Place(version=version.name, filename=filename, line=line)
                yield place, _words(record_id, record_from_json(text))

    def _require_pinned(self, context: TaskContext, version: task_pb2.TrainingVersion) -> None:
        request = data_service_pb2.GetDatasetVersionRequest(name=version.name)
        found: dataset_pb2.DatasetVersion = asked(
            lambda: self._data.GetDatasetVersion.future(
                request, metadata=bearer(context.token), timeout=_CALL_SECONDS
            ),
            context.check,
        )
        require_pinned(version.name, version.digest, found.digest)


def clean_answers(
    answers: Mapping[str, Sequence[Answer]], held: Mapping[int, Held]
) -> Mapping[str, Sequence[Answer]]:
    """Return the answers to records that no training version holds."""
    return {
        arm_id: [answer for row, answer in enumerate(said) if row not in held]
        for arm_id, said in answers.items()
    }


def scored_apart(
    learnt: Learnt, answers: Mapping[str, Sequence[Answer]], named: NameScore = score_named
) -> evaluation_pb2.Contamination:
    """Return the counts with the scores over records that were learnt from, and over others. Raises as `estimates`."""
    contamination = evaluation_pb2.Contamination()
    contamination.CopyFrom(learnt.counts)
    clean_by_arm = clean_answers(answers, learnt.held) if learnt.held else {}
    for arm_id, clean in clean_by_arm.items():
        contaminated = [answer for row, answer in enumerate(answers[arm_id]) if row in learnt.held]
        contamination.clean.add(arm_id=arm_id, scores=estimates(clean, named))
        contamination.contaminated.add(arm_id=arm_id, scores=estimates(contaminated, named))
    return contamination


def warnings_of(contamination: evaluation_pb2.Contamination, num_records: int) -> Iterator[str]:
    """Yield what people should know of it."""
    num_held = contamination.num_exact + contamination.num_normalised + contamination.num_ngram
    if num_held:
        first = contamination.records[0]
        yield (
            f"{num_held:,} of {num_records:,} records stand in what the tuned models learnt from "
            f"({contamination.num_exact:,} exactly, {contamination.num_normalised:,} but for their form, "
            f"{contamination.num_ngram:,} by half of their words); they count in no comparison. The first is record "
            f"{first.row}, at {first.filename}:{first.line} of {first.version}"
        )
    if contamination.unknown_models:
        names = ", ".join(contamination.unknown_models)
        yield f"what {names} learnt from is not known any more: records of it may be among those that were asked"


def _counted(
    found: evaluation_pb2.Contamination, questions: Sequence[Question], held: Mapping[int, Held]
) -> evaluation_pb2.Contamination:
    counts = Counter(one.kind for one in held.values())
    found.num_exact = counts[Kind.EXACT]
    found.num_normalised = counts[Kind.NORMALISED]
    found.num_ngram = counts[Kind.NGRAM]
    for row in sorted(held)[:MAX_LISTED]:
        one = held[row]
        found.records.add(
            row=row,
            record_id=questions[row].record_id,
            kind=evaluation_pb2.ContaminationKind.Value(f"CONTAMINATION_KIND_{one.kind.name}"),
            overlap=one.overlap,
            version=one.place.version,
            filename=one.place.filename,
            line=one.place.line,
        )
    return found


def _words(record_id: str, record: Record) -> Words:
    single = _single(record)
    if isinstance(single, CompletionRecord):
        return Words(record_id=record_id, question=single.prompt, answer=single.completion)
    turns = "\n".join(message.content for message in single.messages[:-1])
    return Words(record_id=record_id, question=turns, answer=reference_text(single))


def _single(record: Record) -> SingleRecord:
    return record if isinstance(record, ChatRecord | CompletionRecord) else chosen_record(record)
