"""What judges' endpoints are called: counted over all attempts, and written down before it is done."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from luthier.errors import LuthierError
from luthier.evaluation.worker.answered import Answered
from luthier.work.judge_calls import JudgeAnswer, JudgeCalls
from luthier.work.limited import Check
from luthier.worker.v1 import task_pb2


class Spending:
    """What one endpoint was called by an evaluation, attempts before this one included.

    Calls are taken before they are made, and given back where they were not: an attempt that is killed leaves those
    that it took as made, so that there are never more than `max_calls`.

    Args:
        answered: where it is kept.
        key: under which name.
        max_calls: the most calls; 0, as an evaluation has it that was made before there was a limit: any number.
    """

    def __init__(self, answered: Answered, key: str, max_calls: int) -> None:
        self._answered = answered
        self._key = key
        self._most = max_calls or sys.maxsize
        self._lines = [batch.spent for batch in answered.of(key)]

    @property
    def total(self) -> task_pb2.JudgeSpending:
        """What was spent so far; calls that are taken count as made."""
        return task_pb2.JudgeSpending(
            num_calls=sum(line.num_calls for line in self._lines),
            num_prompt_tokens=sum(line.num_prompt_tokens for line in self._lines),
            num_generated_tokens=sum(line.num_generated_tokens for line in self._lines),
        )

    def asked(
        self, calls: JudgeCalls, prompts: Sequence[str], check: Check
    ) -> list[JudgeAnswer | LuthierError]:
        """Return what an endpoint says to each prompt, JUDGE_CALLS_SPENT where no call is left for it.

        Raises:
            LuthierError: as `JudgeCalls.ask`, or the service refused.
        """
        self._lines.append(task_pb2.JudgeSpending())
        try:
            return calls.ask(prompts, check, self._take)
        finally:
            spent = calls.spent()
            self._write(
                task_pb2.JudgeSpending(
                    num_calls=spent.num_calls,
                    num_prompt_tokens=spent.num_prompt_tokens,
                    num_generated_tokens=spent.num_generated_tokens,
                )
            )

    def _take(self, wanted: int) -> int:
        """Let the last line say that some more calls were made, as many as there are; the service keeps it."""
        taken = min(wanted, self._most - self.total.num_calls)
        if taken > 0:
            self._write(task_pb2.JudgeSpending(num_calls=self._lines[-1].num_calls + taken))
            self._answered.commit()
        return max(taken, 0)

    def _write(self, line: task_pb2.JudgeSpending) -> None:
        number = len(self._lines) - 1
        self._lines[number] = line
        # The record makes it a step of its own; it is no answer.
        row = task_pb2.AnsweredRecord(row=number)
        self._answered.add(
            task_pb2.AnsweredBatch(arm_id=self._key, first_row=number, records=[row], spent=line)
        )
