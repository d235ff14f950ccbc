"""Answers of a reinforcement job: made text, graded, kept by the service, and read again by a later attempt."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from transformers import PreTrainedModel

from luthier.errors import FailedPrecondition, Failure, Reason, Unavailable
from luthier.errors.status import failure_to_status, status_to_failure
from luthier.grading.asked import remote_graders, reward_model_graders
from luthier.grading.graders import ReadGrader
from luthier.grading.outcomes import CODES, Sample
from luthier.lm.generate import FinishReason
from luthier.lm.load import eos_token_ids
from luthier.runtime.digests import contents_digest
from luthier.text.tokenizer import BUNDLE_FILES
from luthier.training.recipes.corpus import Split
from luthier.training.recipes.rollouts import Reward, Rollout
from luthier.training.reward_templates import template_warning
from luthier.training.worker.answer_ends import AskText
from luthier.training.worker.order import Desk
from luthier.training.worker.reward_models import Judge, LoadedRewardModel, judges_of, without_stop
from luthier.v1 import evaluation_pb2, grader_pb2, rendering_pb2, rollout_pb2
from luthier.work.limited import Check
from luthier.work.row_file import iterate_rows, write_rows
from luthier.work.text_pool import Bundle, TextPool, TextRefused
from luthier.worker.v1 import task_pb2

_COLUMNS = ("row", "record", "record_id", "filename", "line")
_FINISHED = {
    FinishReason.STOP: evaluation_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: evaluation_pb2.FINISH_REASON_LENGTH,
}
_FINISH_OF = {number: reason for reason, number in _FINISHED.items()}

Decode = Callable[[Sequence[int], bool], str]
"""Turns tokens into text, with the special ones or without them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What asked: the canonical record as JSON, its digest in hex, and where it came from."""

    json: str
    record_id: str
    filename: str
    line: int


class Records:
    """The records of prompts by row, in the columns that they came in."""

    def __init__(self) -> None:
        self._first_rows: list[int] = []
        self._batches: list[Any] = []

    def add(self, batch: Any) -> None:
        """Add a record batch of a PROMPT rendering; batches come in ascending order of their rows.

        Raises:
            FailedPrecondition: RENDERING_KIND_MISMATCH, its rows have no records.
        """
        if "record" not in batch.schema.names:
            raise FailedPrecondition(
                "the rows of a rendering of prompts must have their records, those of this one have none; create it "
                "anew",
                reason=Reason.RENDERING_KIND_MISMATCH,
            )
        if batch.num_rows:
            self._first_rows.append(batch.column("row")[0].as_py())
            wanted = batch.select([name for name in _COLUMNS if name in batch.schema.names])
            # A copy: a column is a view of the message that it came in, with all tokens of the rows.
            self._batches.append(wanted.take(pyarrow.array(np.arange(batch.num_rows))))

    def of(self, row: int) -> Record:
        """Return the record of a row."""
        batch = self._batches[bisect_right(self._first_rows, row) - 1]
        place = int(np.searchsorted(batch.column("row").to_numpy(), row))
        value = {name: batch.column(name)[place].as_py() for name in batch.schema.names}
        assert value["row"] == row, f"row {row} was not read"
        return Record(
            json=value["record"],
            record_id=value.get("record_id") or "",
            filename=value.get("filename") or "",
            line=value.get("line") or 0,
        )


@contextmanager
def asking_texts(folder: Path, check: Check) -> Iterator[AskText]:
    """Give what asks a limited process with a model's tokenizer, for the length of a block; raises what `check` did."""
    files = {name: (folder / name).read_bytes() for name in BUNDLE_FILES if (folder / name).exists()}
    bundle = Bundle(key=contents_digest(files), read=lambda: files)
    with closing(TextPool()) as pool:
        yield lambda request: pool.ask(bundle, request, check=check)


def decoder(ask: AskText) -> Decode:
    """Return what makes text of tokens; it raises FailedPrecondition MODEL_INVALID where the tokenizer fails."""

    def decode(ids: Sequence[int], with_special: bool) -> str:
        try:
            answer = ask({"do": "decode", "ids": list(ids), "with_special": with_special})
        except TextRefused as error:
            raise FailedPrecondition(error.message, reason=error.reason) from error
        text: str = answer["text"]
        return text

    return decode


class JobRollouts:
    """The rollouts of one task: what recipes know as `Rollouts`.

    Args:
        desk: of the task, whose job learns from rewards.
        records: of all its prompts.
        decode: of its base model.
        stop_token_ids: tokens that end an answer.
        judges: the reward models that its graders name.
    """

    def __init__(
        self,
        desk: Desk,
        records: Records,
        decode: Decode,
        stop_token_ids: frozenset[int],
        judges: Sequence[Judge] = (),
    ) -> None:
        self.stop_token_ids = stop_token_ids
        self._desk = desk
        self._records = records
        self._decode = decode
        self._judges = judges
        self._told: set[str] = set()
        self._message = desk.task.train.job.reinforcement.grader
        self._grader = ReadGrader(self._message)
        self._kept = {one.step: one for one in desk.task.train.rollouts}
        self._texts: dict[tuple[int, ...], str] = {}

    def kept(self, step: int) -> Sequence[Rollout]:
        """Return the rollouts that an earlier attempt committed of a step.

        Raises:
            DataLoss: the file is not as it was written.
            LuthierError: the service refused.
        """
        found = self._kept.get(step)
        if found is None:
            return ()
        wanted = task_pb2.BlobFile(
            path="rollouts", sha256=found.file.sha256, size_bytes=found.file.size_bytes
        )
        path = self._desk.fetch(wanted)
        self._desk.log(f"step {step} learns from the {found.num_rollouts} answers that were kept", step=step)
        prompts: dict[tuple[int, ...], tuple[int, ...]] = {}
        messages = map(rollout_pb2.Rollout.FromString, iterate_rows(path))
        return [read_rollout(message, prompts) for message in messages]

    def graded(self, rollouts: Sequence[Rollout], split: Split, most_errors: int) -> list[Reward]:
        """Return what the job's grader makes of answers; reward services and models are asked for a step's at once.

        A service that is away is no verdict on answers: where it would fail the job, the attempt is lost instead, and
        another one grades the very same answers again.

        Raises:
            InvalidArgument: ADDRESS_NOT_ALLOWED.
            Unavailable: REWARD_SERVICE_UNAVAILABLE, for that reason alone `most_errors` have no score, or none has one.
            LuthierError: what the desk raised.
        """
        del split
        self._texts = {}
        texts = [self._answer_text(one) for one in rollouts]
        items = {row: self._records.of(row).json for row in {one.row for one in rollouts}}
        asked = [
            grader_pb2.Sample(item_json=items[one.row], output_text=text, is_truncated=one.is_truncated)
            for one, text in zip(rollouts, texts, strict=True)
        ]
        remote = {
            path: self._desk.scored(grader, asked, most_errors)
            for path, grader in remote_graders(self._message)
        }
        values = self._values(rollouts, items)
        rewards = []
        for place, sample in enumerate(asked):
            self._desk.check()
            outcomes = {path: found[place] for path, found in remote.items()}
            grade = self._grader.grade(
                Sample(
                    item_json=sample.item_json,
                    output_text=sample.output_text,
                    remote=outcomes,
                    values={path: found[place] for path, found in values.items()},
                )
            )
            rewards.append(
                Reward(
                    score=grade.score,
                    reason=None if grade.error is None else grade.error.reason,
                    message="" if grade.error is None else grade.error.message,
                    parts=grade.parts,
                )
            )
        _require_service(rewards, most_errors)
        return rewards

    def _values(self, rollouts: Sequence[Rollout], records: Mapping[int, str]) -> dict[str, list[float]]:
        """Return what reward models say of answers by the path of the grader; each model is asked once."""
        found = {}
        for judge in self._judges:
            for unknown in sorted(judge.unknown_ends(records.values())):
                self._tell(
                    f"the reward model {judge.name} values answers at the last token of their text: {unknown}"
                )
            found[judge.name] = judge.values(rollouts, records, self._desk.check)
        return {path: found[one.model] for path, one in reward_model_graders(self._message)}

    def _tell(self, warning: str) -> None:
        if warning not in self._told:
            self._told.add(warning)
            self._desk.log(warning, "WARNING")

    def keep(self, step: int, rollouts: Sequence[Rollout]) -> None:
        """Commit the rollouts of a step. Raises LuthierError where the service refused."""
        prompts = {one.row: self._decode(one.prompt, True) for one in rollouts if one.sample == 0}
        path = self._desk.scratch / f"rollouts-{step}"
        rows = (
            self._message_of(step, one, prompts[one.row]).SerializeToString(deterministic=True)
            for one in rollouts
        )
        write_rows(path, rows)
        self._texts = {}
        self._desk.commit_rollouts(step, path)
        path.unlink()

    def _answer_text(self, rollout: Rollout) -> str:
        """Return an answer as graders see it: without the token that ended it.

        Each is made text once: those that were graded last are remembered until they are kept.
        """
        ids = without_stop(rollout.token_ids, self.stop_token_ids)
        if ids not in self._texts:
            self._texts[ids] = self._decode(ids, False) if ids else ""
        return self._texts[ids]

    def _message_of(self, step: int, rollout: Rollout, prompt_text: str) -> rollout_pb2.Rollout:
        record, reward = self._records.of(rollout.row), rollout.reward
        assert reward is not None, "rollouts are graded before they are kept"
        message = rollout_pb2.Rollout(
            step=step,
            group=rollout.group,
            sample=rollout.sample,
            row=rollout.row,
            prompt_text=prompt_text,
            output_text=self._answer_text(rollout),
            prompt_token_ids=rollout.prompt,
            token_ids=rollout.token_ids,
            logprobs=rollout.logprobs,
            finish_reason=_FINISHED[rollout.finish_reason],
            part_scores=reward.parts,
            advantage=rollout.advantage,
            record_id=record.record_id,
            filename=record.filename,
            line=record.line,
        )
        if reward.score is None:
            reason = reward.reason or Reason.REWARD_FAILED
            failure = Failure(code=CODES[reason], reason=reason, message=reward.message)
            message.error.CopyFrom(failure_to_status(failure))
        else:
            message.reward = reward.score
        return message


class RolloutsElsewhere:
    """Those of a rank that is not the first, which grades and keeps for all."""

    def __init__(self, stop_token_ids: frozenset[int]) -> None:
        self.stop_token_ids = stop_token_ids

    def kept(self, step: int) -> Sequence[Rollout]:
        """Is asked of the first rank."""
        raise AssertionError(f"the first rank knows what was kept of step {step}")

    def graded(self, rollouts: Sequence[Rollout], split: Split, most_errors: int) -> list[Reward]:
        """Is asked of the first rank."""
        del most_errors
        raise AssertionError(f"the first rank grades {len(rollouts)} answers of {split}")

    def keep(self, step: int, rollouts: Sequence[Rollout]) -> None:
        """Is asked of the first rank."""
        raise AssertionError(f"the first rank keeps the {len(rollouts)} answers of step {step}")


def stop_tokens(rendering: rendering_pb2.Rendering, model: PreTrainedModel) -> frozenset[int]:
    """Return what ends an answer: what ends those of a rendering's records, and what ends one by the model itself."""
    return frozenset(rendering.stop_token_ids) | frozenset(eos_token_ids(model))


@contextmanager
def rollouts_of(
    desk: Desk,
    records: Records,
    rendering: rendering_pb2.Rendering,
    model: PreTrainedModel,
    loaded: Sequence[LoadedRewardModel],
    micro_batch_tokens: int,
    longest: int = 0,
) -> Iterator[JobRollouts]:
    """Give a task's rollouts for the length of a block; its base model's files are in the scratch folder `base`.

    An answer ends as those of the records of the job's `rendering` do, and where the model itself ends one. `loaded`
    are the reward models of its grader, which value passes of `micro_batch_tokens`, `longest` the most tokens of a
    prompt and its answer.

    Raises:
        FailedPrecondition: SEQUENCE_TOO_LONG, a reward model cannot value the longest.
    """
    stops = stop_tokens(rendering, model)
    with asking_texts(desk.scratch / "base", desk.check) as ask:
        judges = judges_of(loaded, ask, stops, micro_batch_tokens)
        for judge in judges:
            judge.require_room(longest)
            warning = template_warning(judge.name, judge.loaded.taught, rendering)
            if warning:
                desk.log(warning, "WARNING")
        yield JobRollouts(desk, records, decoder(ask), stops, judges)


def read_rollout(message: rollout_pb2.Rollout, prompts: dict[tuple[int, ...], tuple[int, ...]]) -> Rollout:
    """Return a kept rollout as recipes know it, the very numbers that were learnt from.

    Its prompt is that of `prompts` where it is there, and is added where not: answers to a prompt share its tokens.
    """
    prompt = tuple(message.prompt_token_ids)
    if message.WhichOneof("outcome") == "reward":
        reward = Reward(score=message.reward, parts=dict(message.part_scores))
    else:
        failure = status_to_failure(message.error)
        reward = Reward(
            score=None,
            reason=Reason(failure.reason),
            message=failure.message,
            parts=dict(message.part_scores),
        )
    return Rollout(
        group=message.group,
        sample=message.sample,
        row=message.row,
        prompt=prompts.setdefault(prompt, prompt),
        token_ids=tuple(message.token_ids),
        logprobs=tuple(message.logprobs),
        finish_reason=_FINISH_OF[message.finish_reason],
        reward=reward,
        advantage=message.advantage,
    )


def _require_service(rewards: Sequence[Reward], most_errors: int) -> None:
    """Raise Unavailable where nothing but a service that is away leaves too many answers without a score, or all."""
    failures = [one for one in rewards if one.score is None]
    enough = min(most_errors, len(rewards))
    if not failures or len(failures) < enough:
        return
    if {one.reason for one in failures} == {Reason.REWARD_SERVICE_UNAVAILABLE}:
        raise Unavailable(
            f"fewer than {enough} answers may be without a score, {len(failures)} are; the last of them: "
            f"{failures[-1].message}",
            reason=Reason.REWARD_SERVICE_UNAVAILABLE,
            metadata={"num_grader_errors": str(len(failures))},
        )
