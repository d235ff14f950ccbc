"""What a rendering finds in its records: each kind counted, the first records of it kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from luthier.data.renderings.rules import MAX_FINDING_RECORDS
from luthier.text import findings as text
from luthier.v1.rendering_pb2 import RenderingFinding, RenderingFindingRecord


class RecordFindings:
    """Collects findings record by record. Memory: the first `MAX_FINDING_RECORDS` of each kind."""

    def __init__(self) -> None:
        self._counts: dict[text.FindingKind, int] = {}
        self._records: dict[text.FindingKind, list[RenderingFindingRecord]] = {}

    def add(self, row: Mapping[str, Any], findings: Iterable[text.Finding]) -> None:
        """Count what was found in a record; of several findings of a kind the first message is kept."""
        first: dict[text.FindingKind, str] = {}
        for finding in findings:
            first.setdefault(finding.kind, finding.message)
        for kind, message in first.items():
            self._counts[kind] = self._counts.get(kind, 0) + 1
            records = self._records.setdefault(kind, [])
            if len(records) < MAX_FINDING_RECORDS:
                records.append(
                    RenderingFindingRecord(filename=row["filename"], line=row["line"], message=message)
                )

    def summary(self) -> list[RenderingFinding]:
        """Return what was found."""
        return [
            RenderingFinding(
                kind=RenderingFinding.Kind.Value(f"KIND_{kind.value}"),
                num_records=count,
                records=self._records[kind],
            )
            for kind, count in sorted(self._counts.items())
        ]

    def warnings(self) -> Iterator[str]:
        """Yield a warning for each kind: its count, what it means, and the first place."""
        for kind, count in sorted(self._counts.items()):
            first = self._records[kind][0]
            records = "1 record" if count == 1 else f"{count} records"
            place = f"{first.filename}:{first.line}"
            yield f"in {records} {kind.explanation}; the first is {place}: {first.message}"
