"""Predictions as files: a row for each record and arm, as lines of JSON or as Parquet."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from luthier.client.scores import is_right
from luthier.errors import FailedPrecondition, InvalidArgument
from luthier.v1.evaluation_pb2 import FinishReason, Prediction

SUFFIXES = (".jsonl", ".parquet")
_ROWS_A_GROUP = 1000


def prediction_rows(predictions: Iterable[Prediction]) -> Iterator[dict[str, Any]]:
    """Yield a row for each record and arm, all of the same keys; `right` is null where no score says so."""
    for prediction in predictions:
        prompt = [{"role": turn.role, "content": turn.content} for turn in prediction.prompt]
        for answer in prediction.answers:
            yield {
                "row": prediction.row,
                "record_id": prediction.record_id,
                "filename": prediction.filename,
                "line": prediction.line,
                "prompt": prompt,
                "reference": prediction.reference,
                "arm_id": answer.arm_id,
                "text": answer.text,
                "finish_reason": FinishReason.Name(answer.finish_reason).removeprefix("FINISH_REASON_"),
                "right": is_right(answer),
                "scores": dict(sorted(answer.scores.items())),
                "error": answer.error.message if answer.HasField("error") else None,
            }


def write_predictions(predictions: Iterable[Prediction], path: Path) -> int:
    """Write predictions as the file's suffix says, and return how many rows they are. Memory: a thousand rows.

    Raises:
        InvalidArgument: the suffix is none of `SUFFIXES`.
        FailedPrecondition: pyarrow, which Parquet needs, is not installed.
    """
    rows = prediction_rows(predictions)
    if path.suffix == ".parquet":
        return _write_parquet(rows, path)
    if path.suffix != ".jsonl":
        raise InvalidArgument(f"the file must end with {' or '.join(SUFFIXES)}, got {path.name!r}")
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def _write_parquet(rows: Iterator[dict[str, Any]], path: Path) -> int:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise FailedPrecondition(
            "writing Parquet needs pyarrow: pip install 'luthier-client[arrow]'"
        ) from error
    turn = pa.struct([("role", pa.string()), ("content", pa.string())])
    texts = ("record_id", "filename", "reference", "arm_id", "text", "finish_reason", "error")
    schema = pa.schema(
        [
            ("row", pa.int64()),
            ("line", pa.int64()),
            *((name, pa.string()) for name in texts),
            ("prompt", pa.list_(turn)),
            ("right", pa.bool_()),
            ("scores", pa.map_(pa.string(), pa.float64())),
        ]
    )
    count = 0
    with pq.ParquetWriter(path, schema) as writer:
        while group := list(islice(rows, _ROWS_A_GROUP)):
            for row in group:
                row["scores"] = list(row["scores"].items())
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
            count += len(group)
    return count
