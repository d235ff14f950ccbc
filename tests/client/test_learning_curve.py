"""How much of the data each model of a curve learns from where nobody says."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
from click.testing import Result

from luthier.client import Client
from luthier.client.data_parts import RecordParts
from luthier.errors import InvalidArgument
from luthier.text.records import CompletionRecord, record_id, record_to_json
from luthier.v1.evaluation_pb2 import Evaluation
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob
from luthier.v1.rendering_pb2 import Rendering

Parts = list[tuple[str, float, int]]


@pytest.fixture
def made(services: Any, monkeypatch: pytest.MonkeyPatch) -> Parts:
    """What parts are to be made of two hundred records; the first that is all of them ends the call."""
    module: Any = importlib.import_module("luthier.client.learning_curve")
    found: Parts = []

    async def read(_scope: Any, _version: str, _split: int, into: RecordParts) -> None:
        for number in range(200):
            record = CompletionRecord(prompt=f"p {number}", completion="c")
            into.add(record_id(record), record_to_json(record))

    async def part(
        _scope: Any, _whole: Rendering, curve: str, share: float, count: int, *_others: Any
    ) -> None:
        found.append((curve, share, count))
        if share == 1:
            raise InvalidArgument("enough was seen")

    monkeypatch.setattr(module, "_read", read)
    monkeypatch.setattr(module, "_part", part)
    services.answers["GetRendering"] = lambda request, context: Rendering(
        name=request.name, dataset_version="v"
    )
    return found


def test_a_program_that_names_no_shares_tunes_on_ten_thirty_and_all_of_a_hundred(
    made: Parts, client: Client
) -> None:
    with pytest.raises(InvalidArgument, match="enough was seen"):
        client.learning_curve(FineTuningJob(base_model="m", rendering="r"), Evaluation(), curve_id="c")
    assert made == [("c", 0.1, 20), ("c", 0.3, 60), ("c", 1.0, 200)]


def test_so_does_a_command_that_names_none(made: Parts, run: Callable[..., Result]) -> None:
    done = run("jobs", "learning-curve", "--model", "m", "--rendering", "r", "--name", "c")
    assert "enough was seen" in done.output
    assert made == [("c", 0.1, 20), ("c", 0.3, 60), ("c", 1.0, 200)]
    made.clear()
    run(
        "jobs",
        "learning-curve",
        "--model",
        "m",
        "--rendering",
        "r",
        "--name",
        "c",
        "--share",
        "1",
        "--share",
        "0.5",
    )
    assert made == [("c", 0.5, 100), ("c", 1.0, 200)], "each named share, in order of size"
