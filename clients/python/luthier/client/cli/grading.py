"""`luthier evaluations grade`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import IO, TYPE_CHECKING, Any

import click

from luthier.client.cli.drafts import Draft, pass_draft
from luthier.client.cli.session import Session, pass_session
from luthier.client.escaping import escaped_line

if TYPE_CHECKING:
    from rich.table import Table

    from luthier.v1.grader_pb2 import Grader, Sample, SampleGrade

_KEYS = ("item", "output_text", "is_truncated")


def _kind() -> type[Grader]:
    from luthier.v1.grader_pb2 import Grader

    return Grader


@click.command()
@click.option(
    "--samples",
    type=click.Path(exists=True, dir_okay=False, allow_dash=True),
    required=True,
    metavar="FILE",
    help='Answers to grade, a line each: {"item": {...}, "output_text": "..."}; - is standard input.',
)
@pass_session
@pass_draft(_kind)
def grade(session: Session, draft: Draft[Grader], samples: str) -> None:
    """Try a grader on given answers, without a job. A sample that cannot be graded has an error and no score."""
    seen: list[SampleGrade] = []
    source = "<stdin>" if samples == "-" else escaped_line(samples)
    with click.open_file(samples, "rb") as file:
        grades = session.client.evaluations.grade(draft.finish(), _samples(file, source))
        session.show_list(_kept(grades, seen), _table)
    scores = [one.score for one in seen if one.HasField("score")]
    if not session.for_programs and scores:
        session.note(f"mean {sum(scores) / len(scores):.4g} of {len(scores)} scores")
    if len(scores) < len(seen):
        session.note(
            f"{len(seen) - len(scores)} of {len(seen)} samples could not be graded; they are in no mean"
        )


def _kept(grades: Iterable[SampleGrade], seen: list[SampleGrade]) -> Iterator[SampleGrade]:
    for one in grades:
        seen.append(one)
        yield one


def _samples(file: IO[bytes], source: str) -> Iterator[Sample]:
    """Read the samples line by line. Raises UsageError that names the line."""
    from luthier.v1.grader_pb2 import Sample

    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        where = f"{source}:{number}"
        values = _object(line, where)
        if unknown := sorted(values.keys() - set(_KEYS)):
            named = ", ".join(escaped_line(name) for name in unknown[:5])
            raise click.UsageError(f"{where}: must hold {', '.join(_KEYS)} alone, got {named}")
        item, output_text = values.get("item", {}), values.get("output_text")
        is_truncated = values.get("is_truncated", False)
        if not isinstance(item, dict) or not isinstance(output_text, str):
            raise click.UsageError(f"{where}: item must be an object and output_text a text")
        if not isinstance(is_truncated, bool):
            raise click.UsageError(f"{where}: is_truncated must be true or false")
        item_json = json.dumps(item, ensure_ascii=False)
        try:
            yield Sample(item_json=item_json, output_text=output_text, is_truncated=is_truncated)
        except ValueError as error:  # half a character
            raise click.UsageError(f"{where}: must be Unicode text: {error}") from error


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise click.UsageError(f"{where}: must be a JSON object on one line: {error}") from error
    if not isinstance(values, dict):
        raise click.UsageError(f"{where}: must be a JSON object on one line")
    return values


def _table(grades: Iterable[SampleGrade]) -> Table:
    from rich.text import Text

    from luthier.client.cli.views import table

    rows = list(grades)
    parts = sorted({name for one in rows for name in one.part_scores})
    made = table("#SAMPLE", "#SCORE", *(f"#{name}" for name in parts), "ERROR")
    for number, one in enumerate(rows):
        error = Text(one.error.message, "red") if one.HasField("error") else Text("")
        score = f"{one.score:.4g}" if one.HasField("score") else ""
        shown = (f"{one.part_scores[name]:.4g}" if name in one.part_scores else "" for name in parts)
        made.add_row(str(number), score, *shown, error)
    return made
