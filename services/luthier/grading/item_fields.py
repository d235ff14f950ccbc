"""What a grader's templates read of records, to be looked at before there are answers."""

from __future__ import annotations

from collections.abc import Iterator

from luthier.grading import templates
from luthier.grading.asked import field_of, leaves
from luthier.grading.outcomes import GradingError, Sample
from luthier.grading.templates import Place, Template
from luthier.v1.grader_pb2 import Grader

_TEMPLATES = ("input", "reference")


class ItemFields:
    """The fields of records that a grader's own templates name; what a reward service reads is not known.

    The message must have passed `checks.grader_violations`.
    """

    def __init__(self, grader: Grader) -> None:
        self._read = list(_item_templates(grader, ""))

    def __bool__(self) -> bool:
        """Whether any field is named."""
        return bool(self._read)

    def require(self, item_json: str) -> None:
        """Return if a record, a JSON object, has them all.

        Raises:
            GradingError: TEMPLATE_FIELD_MISSING, or what else keeps them from being put in; it names the grader.
        """
        sample = Sample(item_json=item_json, output_text="")
        for label, template in self._read:
            try:
                template.filled(sample)
            except GradingError as error:
                raise GradingError(error.reason, f"{label}: {error.message}") from error


def fields_read(grader: Grader, field: str) -> Iterator[tuple[str, str, str]]:
    """Yield what a grader's own templates read of records: the template's field, what is written, the record's field.

    `field` is the grader's own in a request; the message must have passed `checks.grader_violations`.
    """
    for path, leaf in leaves(grader):
        kind = leaf.WhichOneof("kind")
        message = getattr(leaf, kind or "")
        for name in _TEMPLATES:
            place = f"{field_of(field, path)}.{kind}.{name}"
            deeper = (part for part in _item_parts(getattr(message, name, ""), name) if part.steps)
            for part in deeper:
                yield place, part.written, str(part.steps[0])


def _item_templates(grader: Grader, path: str) -> Iterator[tuple[str, Template]]:
    kind = grader.WhichOneof("kind")
    assert kind is not None, "a grader that passed the checks has a kind"
    if kind == "multi":
        for name, inner in sorted(grader.multi.graders.items()):
            yield from _item_templates(inner, f"{path}.{name}" if path else name)
        return
    message = getattr(grader, kind)
    for field in _TEMPLATES:
        parts = tuple(_item_parts(getattr(message, field, ""), field))
        if parts:
            yield f"grader {path or grader.name or kind}", Template(field=field, parts=parts)


def _item_parts(text: str, field: str) -> Iterator[Place]:
    for part in templates.parsed(text, field).parts:
        if isinstance(part, Place) and part.namespace == "item":
            yield part
