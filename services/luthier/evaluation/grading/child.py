"""The process that grades for the service: `luthier.evaluation.grading.service` asks it, a sample at a time.

Similarities of long texts take seconds of processor time, and regular expressions are of whoever calls: neither
belongs into a process that serves.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from luthier.errors import Reason
from luthier.grading.graders import ReadGrader
from luthier.grading.outcomes import GradingError, Sample
from luthier.grading.similarity import load_libraries
from luthier.v1.grader_pb2 import Grader
from luthier.work.limited_child import Note, serve


@lru_cache(maxsize=4)
def _read(encoded: str) -> ReadGrader:
    return ReadGrader(Grader.FromString(base64.b64decode(encoded)))


def _handle(request: Mapping[str, Any], note: Note) -> dict[str, Any]:
    del note
    sample = Sample(
        item_json=request["item_json"],
        output_text=request["output_text"],
        remote={path: _outcome(one) for path, one in request["remote"].items()},
        values={path: _outcome(one) for path, one in request["values"].items()},
    )
    grade = _read(request["grader"]).grade(sample)
    if grade.error is None:
        return {"score": grade.score, "parts": dict(grade.parts)}
    return {"reason": grade.error.reason, "message": grade.error.message, "parts": dict(grade.parts)}


def _outcome(one: Mapping[str, Any]) -> float | GradingError:
    return one["score"] if "score" in one else GradingError(Reason(one["reason"]), one["message"])


def main() -> None:
    """Grade what the parent asks."""
    load_libraries()
    serve(_handle, writes_files=False)


if __name__ == "__main__":
    main()
