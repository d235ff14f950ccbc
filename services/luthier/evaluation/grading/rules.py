"""What may be graded: limits of a request."""

from __future__ import annotations

from collections.abc import Iterator

from luthier.errors import FieldViolation
from luthier.grading.checks import grader_violations
from luthier.grading.outcomes import MAX_ITEM_BYTES
from luthier.grading.templates import MAX_TEXT_CHARACTERS
from luthier.runtime.field_limits import (
    LimitTable,
    characters,
    count,
    limit_violations,
    num_bytes,
    refuse,
    required,
)
from luthier.v1.evaluation_service_pb2 import GradeSamplesRequest

MAX_SAMPLES = 256
LIMITS: LimitTable = {
    "grader": required("must be a grader"),
    "samples": count(MAX_SAMPLES, "samples", least=1),
    "samples[].item_json": num_bytes(MAX_ITEM_BYTES),
    "samples[].output_text": characters(MAX_TEXT_CHARACTERS),
}


def check(request: GradeSamplesRequest) -> None:
    """Raise InvalidArgument that names every field that can never be right."""
    refuse([*limit_violations(request, LIMITS), *_grader_violations(request)])


def _grader_violations(request: GradeSamplesRequest) -> Iterator[FieldViolation]:
    if request.HasField("grader"):
        yield from grader_violations(request.grader, "grader")
