"""What graders may be: limits by field, and what must be read before it can be graded with."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from luthier.errors import FieldViolation
from luthier.grading import expressions, patterns, templates
from luthier.runtime.field_limits import (
    REQUIRED,
    Limit,
    LimitTable,
    characters,
    count,
    demanded,
    limit_violations,
    matching,
    named,
    not_negative,
    positive,
    required,
    whole,
)
from luthier.v1.grader_pb2 import Grader, ScoreRange, StringCheckGrader, TextSimilarityGrader

MAX_TEMPLATE_CHARACTERS = 4096
MAX_FIELDS = 100
MAX_PARTS = 16
"""Graders in one multi grader."""
MAX_GRADERS = 32
"""Graders in all."""
MAX_MULTI_DEPTH = 3
"""Multi graders in one another."""
MAX_BATCH_SIZE = 256
MAX_TIMEOUT_SECONDS = 600.0
_MAX_BOUND = 1e6
_MAX_TOLERANCE = 1e300
_ADDRESS = re.compile(r"(?:\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,253}):[0-9]{1,5}")
_TEMPLATE = (REQUIRED, characters(MAX_TEMPLATE_CHARACTERS))
_BOUND = Limit(
    rule=f"must be in {-_MAX_BOUND:g}..{_MAX_BOUND:g}", allows=lambda value: abs(value) <= _MAX_BOUND
)
LIMITS: LimitTable = {
    "name": (
        characters(64),
        Limit(rule="must hold no control characters", allows=lambda text: text.isprintable()),
    ),
    "string_check.input": _TEMPLATE,
    "string_check.reference": characters(MAX_TEMPLATE_CHARACTERS),
    "string_check.operation": named(StringCheckGrader.Operation.DESCRIPTOR),
    "text_similarity.input": _TEMPLATE,
    "text_similarity.reference": _TEMPLATE,
    "text_similarity.evaluation_metric": named(TextSimilarityGrader.Similarity.DESCRIPTOR),
    "multi.graders": count(MAX_PARTS, "graders", least=1),
    "multi.calculate_output": (REQUIRED, characters(expressions.MAX_CHARACTERS)),
    "multi.range.min": _BOUND,
    "multi.range.max": _BOUND,
    "json_match.input": _TEMPLATE,
    "json_match.reference": _TEMPLATE,
    "json_match.fields": count(MAX_FIELDS, "fields"),
    "json_match.fields[]": characters(200),
    "number_match.input": _TEMPLATE,
    "number_match.reference": _TEMPLATE,
    "number_match.absolute_tolerance": not_negative(_MAX_TOLERANCE),
    "number_match.relative_tolerance": not_negative(_MAX_TOLERANCE),
    "number_match.pattern": characters(patterns.MAX_CHARACTERS),
    "regex.input": _TEMPLATE,
    "regex.pattern": (REQUIRED, characters(patterns.MAX_CHARACTERS)),
    "remote.address": demanded(matching(_ADDRESS, "host:port, e.g. 127.0.0.1:50051")),
    "remote.range.min": _BOUND,
    "remote.range.max": _BOUND,
    "remote.timeout_seconds": positive(MAX_TIMEOUT_SECONDS),
    "remote.max_batch_size": whole(1, MAX_BATCH_SIZE),
    "reward_model.model": required("must name a reward model"),
}
"""Of one grader, without those in it."""


@dataclass(slots=True)
class _Walk:
    """What was met so far."""

    num_graders: int = 0
    reads_sample: bool = False


def grader_violations(grader: Grader, field: str) -> Iterator[FieldViolation]:
    """Yield what is wrong with a grader, whose path in the request is `field`; nothing: `ReadGrader` can read it."""
    walk = _Walk()
    violations = list(_of_grader(grader, field, 0, walk))
    yield from violations
    if not violations and not walk.reads_sample:
        yield FieldViolation(
            field=field,
            description="must read the answer, as {{sample.output_text}} does: all answers would get one score",
        )


def _of_grader(grader: Grader, field: str, depth: int, walk: _Walk) -> Iterator[FieldViolation]:
    walk.num_graders += 1
    kind = grader.WhichOneof("kind")
    if walk.num_graders > MAX_GRADERS:
        if walk.num_graders == MAX_GRADERS + 1:
            yield FieldViolation(
                field=field, description=f"must be one of at most {MAX_GRADERS} graders in all"
            )
        return
    if kind is None:
        kinds = ", ".join(one.name for one in Grader.DESCRIPTOR.oneofs_by_name["kind"].fields)
        yield FieldViolation(field=field, description=f"must be one of {kinds}, got nothing")
        return
    broken = list(limit_violations(grader, LIMITS, field))
    yield from broken
    if broken:
        return
    walk.reads_sample |= kind in ("remote", "reward_model")
    yield from _of_texts(grader, kind, field, walk)
    if kind == "multi":
        yield from _of_multi(grader, f"{field}.multi", depth + 1, walk)
    if kind in ("multi", "remote") and getattr(grader, kind).HasField("range"):
        yield from _of_range(getattr(grader, kind).range, f"{field}.{kind}.range")


def _of_texts(grader: Grader, kind: str, field: str, walk: _Walk) -> Iterator[FieldViolation]:
    message = getattr(grader, kind)
    for name, read in _READERS.items():
        if name not in message.DESCRIPTOR.fields_by_name or not getattr(message, name):
            continue
        problem, reads_sample = read(getattr(message, name))
        walk.reads_sample |= reads_sample
        if problem:
            yield FieldViolation(field=f"{field}.{kind}.{name}", description=problem)
    if kind == "number_match" and message.pattern:
        yield from _of_number_pattern(message.pattern, f"{field}.{kind}.pattern")


def _of_number_pattern(text: str, field: str) -> Iterator[FieldViolation]:
    try:
        num_groups = patterns.parsed(text).num_groups
    except ValueError:
        return  # it was named before
    if num_groups != 1:
        yield FieldViolation(
            field=field,
            description=f"must have one group, which holds the number, got {num_groups}; (?:...) does not count",
        )


def _of_multi(grader: Grader, field: str, depth: int, walk: _Walk) -> Iterator[FieldViolation]:
    if depth > MAX_MULTI_DEPTH:
        yield FieldViolation(
            field=field, description=f"multi graders must stand at most {MAX_MULTI_DEPTH} deep"
        )
        return
    inner = dict(sorted(grader.multi.graders.items()))
    for name, one in inner.items():
        path = f"{field}.graders[{name!r}]"
        if not expressions.may_be_called(name):
            yield FieldViolation(
                field=path,
                description="must be called [a-z_][a-z0-9_]{0,62}, and not as a function of calculate_output is",
            )
        yield from _of_grader(one, path, depth, walk)
    try:
        names = expressions.parsed(grader.multi.calculate_output).names
    except ValueError:
        return  # it was named before
    if unknown := sorted(names - inner.keys()):
        yield FieldViolation(
            field=f"{field}.calculate_output",
            description=f"must name graders of this one, which are {', '.join(inner)}, got {', '.join(unknown)[:200]}",
        )


def _of_range(limits: ScoreRange, field: str) -> Iterator[FieldViolation]:
    if not limits.min < limits.max:
        yield FieldViolation(
            field=field, description=f"min must be below max, got {limits.min:g} and {limits.max:g}"
        )


def _of_template(text: str) -> tuple[str, bool]:
    try:
        return "", templates.parsed(text, "").reads_sample
    except ValueError as error:
        return str(error), False


def _reading(read: Callable[[str], object]) -> Callable[[str], tuple[str, bool]]:
    def problem(text: str) -> tuple[str, bool]:
        try:
            read(text)
        except ValueError as error:
            return str(error), False
        return "", False

    return problem


_READERS: Mapping[str, Callable[[str], tuple[str, bool]]] = {
    "input": _of_template,
    "reference": _of_template,
    "pattern": _reading(patterns.parsed),
    "calculate_output": _reading(expressions.parsed),
}
"""What is wrong with a text by the name of its field, and whether it reads the answer."""
