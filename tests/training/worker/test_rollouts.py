"""What a worker makes of a job's answers: text, records and messages, each held once and no longer than needed."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from tests.training.worker.test_reinforcement import LOW

from luthier.lm.generate import FinishReason
from luthier.training.recipes.rollouts import Rollout
from luthier.training.worker.rollouts import Decode, JobRollouts, Records
from luthier.v1.rollout_pb2 import Rollout as Message
from luthier.work.row_file import iterate_rows
from luthier.worker.v1 import task_pb2

END = 2
PROMPTS = {0: (5, 9, 11), 1: (8, 7)}


class Context:
    """A task with a scratch folder and nobody behind it; `committed` are the rollouts of its steps."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.task = task_pb2.Task()
        self.task.train.job.reinforcement.grader.CopyFrom(LOW)
        self.committed: dict[int, Path] = {}

    def check(self) -> None:
        """It goes on."""

    def log(self, text: str, step: int) -> None:
        """Nobody hears it."""

    def commit_rollouts(self, step: int, path: Path) -> None:
        self.committed[step] = path.rename(self.scratch / f"committed-{step}")
        path.touch()

    def fetch(self, file: task_pb2.BlobFile) -> Path:
        return self.scratch / f"committed-{file.sha256}"


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(tmp_path)


def records_of(data: Any) -> Records:
    records = Records()
    records.add(data)
    return records


def batch(num_rows: int, text: str = "{}") -> pyarrow.RecordBatch:
    rows = np.arange(num_rows, dtype=np.int64)
    columns = {
        "row": pyarrow.array(rows),
        "record": pyarrow.array([f'{{"text": "{text}{row}"}}' for row in rows]),
        "line": pyarrow.array(rows + 1),
        "input_ids": pyarrow.array([[7] * 1000] * num_rows),
    }
    return pyarrow.RecordBatch.from_pydict(columns)


def rollouts_with(context: Any, decode: Decode) -> JobRollouts:
    return JobRollouts(context, records_of(batch(2)), decode, frozenset({END}))


def drawn() -> list[Rollout]:
    return [
        Rollout(
            group=row,
            sample=sample,
            row=row,
            prompt=prompt,
            token_ids=(40 + sample, 50, END),
            logprobs=(-1.0, -2.0, -0.5),
            finish_reason=FinishReason.STOP,
        )
        for row, prompt in PROMPTS.items()
        for sample in range(3)
    ]


def words(ids: Sequence[int], with_special: bool) -> str:
    del with_special
    return " ".join(f"w{one}" for one in ids)


def graded_and_kept(rollouts: JobRollouts, step: int) -> None:
    answers = drawn()
    rewards = rollouts.graded(answers, "TRAIN", 64)
    rollouts.keep(step, [replace(one, reward=reward) for one, reward in zip(answers, rewards, strict=True)])


def test_each_answer_is_made_text_once(context: Context) -> None:
    asked: Counter[tuple[int, ...]] = Counter()

    def decode(ids: Sequence[int], with_special: bool) -> str:
        asked[tuple(ids)] += 1
        return words(ids, with_special)

    rollouts = rollouts_with(context, decode)
    graded_and_kept(rollouts, 1)
    assert sorted(asked) == sorted([*PROMPTS.values(), (40, 50), (41, 50), (42, 50)])
    assert set(asked.values()) == {1}
    found = [Message.FromString(row) for row in iterate_rows(context.committed[1])]
    assert [one.output_text for one in found] == ["w40 w50", "w41 w50", "w42 w50"] * 2
    graded_and_kept(rollouts, 2)
    assert asked[40, 50] == 2, "texts are remembered for one step"


def test_kept_answers_to_a_prompt_share_its_tokens(context: Context) -> None:
    rollouts = rollouts_with(context, words)
    graded_and_kept(rollouts, 1)
    kept = task_pb2.StepRollouts(step=1, file=task_pb2.BlobFile(sha256="1"), num_rollouts=6)
    context.task.train.rollouts.append(kept)
    found = rollouts_with(context, words).kept(1)
    assert [(one.prompt, one.token_ids) for one in found] == [(one.prompt, one.token_ids) for one in drawn()]
    assert {one.row: one.prompt for one in found} == PROMPTS
    assert len({id(one.prompt) for one in found}) == 2


def test_records_let_go_of_the_messages_that_they_came_in() -> None:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, batch(50).schema) as writer:
        writer.write_batch(batch(50, "häh"))
    held = np.frombuffer(sink.getvalue(), dtype=np.uint8).copy()
    assert len(held) > 50 * 8000
    message = weakref.ref(held)
    with pyarrow.ipc.open_stream(pyarrow.py_buffer(held)) as reader:
        records = records_of(reader.read_next_batch())
    del held, reader
    gc.collect()
    assert message() is None
    assert records.of(49).json == '{"text": "häh49"}'
    assert records.of(49).line == 50
