"""Given samples, read as records that ask for their answers, and what a reward model values them at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from luthier.errors import Reason
from luthier.evaluation.grading.samples import failed
from luthier.evaluation.worker.valuing import Answer, Valuer
from luthier.grading.outcomes import GradingError
from luthier.grading.outcomes import Sample as ReadSample
from luthier.text.records import ChatRecord, CompletionRecord, Message, SingleRecord
from luthier.v1.grader_pb2 import Sample, SampleGrade

_NAMES = ("name", "tool_call_id")


def sample_values(valuer: Valuer, samples: Sequence[Sample]) -> list[SampleGrade]:
    """Return what a reward model values samples at, in their order: a score, or why there is none.

    Raises:
        LuthierError: as `Valuer.values`.
    """
    grades = [SampleGrade() for _ in samples]
    answers: dict[int, Answer] = {}
    for place, sample in enumerate(samples):
        try:
            record = asking_record(sample.item_json)
        except GradingError as error:
            grades[place] = failed(error.reason, error.message)
        else:
            answers[place] = Answer(record, sample.output_text, sample.is_truncated)
    for place, grade in zip(answers, valuer.values(list(answers.values())), strict=True):
        grades[place] = grade
    return grades


def asking_record(item_json: str) -> SingleRecord:
    """Return the record that asks for an answer, whose own answer is empty.

    It is read as records of dataset versions are: `messages`, whose last turn is the answer where it is an assistant's,
    and before the last turn of `chosen` what leads to it; or `prompt`. Other fields are not looked at.

    Raises:
        GradingError: GRADER_INPUT_INVALID, it is no such record.
    """
    item = ReadSample(item_json=item_json, output_text="").item
    if "messages" in item:
        return _conversation(item)
    prompt = item.get("prompt")
    if not isinstance(prompt, str):
        found = ", ".join(item)[:200] or "nothing"
        raise _refused(f"it must have messages, or a prompt that is a text, it has {found}")
    return CompletionRecord(prompt=prompt, completion="")


def _conversation(item: Mapping[str, Any]) -> ChatRecord:
    turns = [_message(turn, f"messages[{at}]") for at, turn in enumerate(_objects(item, "messages"))]
    if "chosen" in item:
        turns += [_message(turn, f"chosen[{at}]") for at, turn in enumerate(_objects(item, "chosen"))][:-1]
    elif turns and turns[-1].role == "assistant":
        turns.pop()
    if not turns:
        raise _refused("messages must have a turn that asks, they have none")
    answer = Message(role="assistant", content="")
    return ChatRecord(messages=(*turns, answer), tools=tuple(_objects(item, "tools")))


def _message(turn: Mapping[str, Any], place: str) -> Message:
    for name in ("role", "content"):
        if not isinstance(turn.get(name), str):
            raise _refused(f"{place}.{name} must be a text")
    for name in _NAMES:
        if not isinstance(turn.get(name, ""), str):
            raise _refused(f"{place}.{name} must be a text")
    return Message(
        role=turn["role"],
        content=turn["content"],
        tool_calls=tuple(_objects(turn, "tool_calls")),
        **{name: turn[name] for name in _NAMES if name in turn},
    )


def _objects(values: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    found = values.get(name, [])
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise _refused(f"{name} must be a list of objects")
    return found


def _refused(problem: str) -> GradingError:
    message = f"to be valued the record must be one that asks, as those of dataset versions do: {problem}"
    return GradingError(Reason.GRADER_INPUT_INVALID, message)
