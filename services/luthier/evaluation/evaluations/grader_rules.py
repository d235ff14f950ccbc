"""What graders of an evaluation may be, and what a worker says of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from luthier.errors import FieldViolation, InvalidArgument, Reason
from luthier.grading.checks import grader_violations
from luthier.grading.item_fields import fields_read
from luthier.grading.metrics.scores import GRADED
from luthier.runtime.field_limits import ANY, LimitTable, count, demanded
from luthier.runtime.names import ID_LIMIT
from luthier.runtime.result_limits import TEXT
from luthier.v1.evaluation_pb2 import Evaluation
from luthier.v1.grader_pb2 import Grader, GraderResult

MAX_GRADERS = 8
"""As many as leave the comparisons of the most arms on the most fields below what one message may hold."""
RECORD_FIELDS = ("messages", "prompt", "completion", "chosen", "rejected", "tools", "label")
"""What records of dataset versions may have, whatever their format was."""
GRADER_LIMITS: LimitTable = {
    "graders": count(MAX_GRADERS, "graders"),
    "graders[].name": demanded(ID_LIMIT),
}
"""What `checks.grader_violations` does not say."""
GRADER_RESULT_LIMITS: LimitTable = {
    "name": demanded(ID_LIMIT),
    "num_graded": ANY,
    "num_errors": ANY,
    "errors": count(16, "reasons"),
    "errors[].reason": TEXT,
    "errors[].count": ANY,
    "errors[].first_message": TEXT,
}
"""What a worker may say of a grader."""


def scores_of_graders(evaluation: Evaluation) -> list[str]:
    """Return the scores that the graders give."""
    return [f"{GRADED}{grader.name}" for grader in evaluation.graders]


def graders_violations(evaluation: Evaluation) -> Iterator[FieldViolation]:
    """Yield what is wrong with the graders of an evaluation, as far as no address has to be known for that."""
    for name, times in Counter(grader.name for grader in evaluation.graders).items():
        if times > 1 and name:
            description = f"name must be unique, got {name!r} {times} times"
            yield FieldViolation(field="evaluation.graders", description=description)
    for index, grader in enumerate(evaluation.graders):
        field = f"evaluation.graders[{index}]"
        broken = list(grader_violations(grader, field))
        yield from broken or _of_records(grader, field)


def require_graders(evaluation: Evaluation, found: Iterable[GraderResult]) -> None:
    """Raise InvalidArgument unless there is a result of each grader, in their order."""
    wanted = [grader.name for grader in evaluation.graders]
    got = [one.name for one in found]
    if got != wanted:
        description = f"must be of {', '.join(wanted) or 'none'}, got {', '.join(got) or 'none'}"
        raise InvalidArgument.of_fields(FieldViolation(field="grader_results", description=description))


def _of_records(grader: Grader, field: str) -> Iterator[FieldViolation]:
    for place, written, name in fields_read(grader, field):
        if name not in RECORD_FIELDS:
            description = (
                f"names {{{{{written}}}}}, but no record has a field {name!r}: records of a dataset version have "
                f"{', '.join(RECORD_FIELDS)}"
            )
            yield FieldViolation(field=place, description=description, reason=Reason.TEMPLATE_FIELD_MISSING)
