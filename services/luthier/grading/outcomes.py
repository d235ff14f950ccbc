"""What is graded, and what comes of it: a score, or an error with words. An error is never a score."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NoReturn

from luthier.errors import Reason

MAX_ITEM_BYTES = 1 << 18
CODES: Mapping[Reason, str] = {
    Reason.TEMPLATE_FIELD_MISSING: "INVALID_ARGUMENT",
    Reason.GRADER_INPUT_INVALID: "INVALID_ARGUMENT",
    Reason.TEMPLATE_INVALID: "INVALID_ARGUMENT",
    Reason.SEQUENCE_TOO_LONG: "FAILED_PRECONDITION",
    Reason.SCORE_NOT_FINITE: "FAILED_PRECONDITION",
    Reason.SCORE_OUT_OF_RANGE: "FAILED_PRECONDITION",
    Reason.REWARD_FAILED: "FAILED_PRECONDITION",
    Reason.REWARD_SERVICE_INVALID: "FAILED_PRECONDITION",
    Reason.REWARD_SERVICE_UNAVAILABLE: "UNAVAILABLE",
    Reason.JUDGE_ANSWER_INVALID: "FAILED_PRECONDITION",
    Reason.GRADING_LIMIT_REACHED: "INVALID_ARGUMENT",
}
"""Status codes of the errors of samples, by their reasons."""


class GradingError(Exception):
    """Why there is no score.

    Attributes:
        reason: what a program can switch on.
        message: what was wrong, for people; it names the grader.
    """

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message

    def __reduce__(self) -> tuple[type[GradingError], tuple[Reason, str]]:
        # Exceptions rebuild themselves from `args`, which has the message alone.
        return type(self), (self.reason, self.message)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """An answer and the record that was asked.

    Attributes:
        item_json: the record as a JSON object; empty: one without fields.
        output_text: the answer.
        remote: what reward services said of it, by the path of the grader (`asked.remote_graders`).
        values: what reward models said of it, by the path of the grader (`asked.reward_model_graders`).
    """

    item_json: str
    output_text: str
    remote: Mapping[str, float | GradingError] = field(default_factory=dict)
    values: Mapping[str, float | GradingError] = field(default_factory=dict)

    @cached_property
    def item(self) -> Mapping[str, Any]:
        """The record. Raises GradingError when it is no JSON object."""
        size_bytes = len(self.item_json.encode("utf-8", "surrogatepass"))
        if size_bytes > MAX_ITEM_BYTES:
            raise _invalid(f"the record must have at most {MAX_ITEM_BYTES} bytes, it has {size_bytes}")
        found = read_json(self.item_json) if self.item_json else {}
        if not isinstance(found, dict):
            raise _invalid("the record must be a JSON object")
        return found

    @cached_property
    def output_json(self) -> Any:
        """The answer as a JSON value. Raises GradingError when it is none."""
        try:
            return read_json(self.output_text)
        except GradingError as error:
            raise _invalid(f"sample.output_json needs an answer that is JSON: {error.message}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Grade:
    """What a grader made of a sample: `score`, or `error` where that is None.

    `parts` are the scores of graders in a multi grader, `outer.inner` where they stand deeper.
    """

    score: float | None
    error: GradingError | None = None
    parts: Mapping[str, float] = field(default_factory=dict)


def read_json(text: str) -> Any:
    """Return a JSON value, numbers finite. Raises GradingError."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        detail = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise _invalid(f"must be JSON: {detail}") from error


def shown(text: str, most: int = 100) -> str:
    """Return a text for a message: quoted, shortened, on one line."""
    return repr(text if len(text) <= most else f"{text[:most]}…")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _invalid(message: str) -> GradingError:
    return GradingError(Reason.GRADER_INPUT_INVALID, message)
