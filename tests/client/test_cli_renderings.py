"""`luthier renderings` against fake services: settings that are sent, findings and refused records that are shown."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from click.testing import Result

from luthier.v1.data_service_pb2 import ListRenderingErrorsResponse
from luthier.v1.dataset_pb2 import RecordError
from luthier.v1.rendering_pb2 import (
    TEMPLATE_ERROR_POLICY_SKIP,
    Rendering,
    RenderingFinding,
    RenderingFindingRecord,
    RenderingSplitStatistics,
)

Run = Callable[..., Result]


def test_renderings_create_by_turn_shows_what_was_found(services: Any, run: Run) -> None:
    seen: list[Rendering] = []

    def create(request: Any, context: Any) -> Rendering:
        seen.append(request.rendering)
        return Rendering(name="projects/default/renderings/r")

    places = [RenderingFindingRecord(filename="a.jsonl", line=line, message="message 1") for line in (3, 9)]
    finding = RenderingFinding(kind=RenderingFinding.KIND_TURN_NOT_WRITTEN, num_records=2, records=places)
    counts = RenderingSplitStatistics(num_records=7, num_refused=2, num_unsupervised=1)
    ready = Rendering(
        name="projects/default/renderings/r",
        state=Rendering.STATE_READY,
        num_errors=2,
        findings=[finding],
        split_statistics=[counts],
    )
    services.answers.update(
        CreateRendering=create,
        WatchRendering=lambda request, context: iter(()),
        GetRendering=lambda request, context: ready,
    )
    result = run(
        "renderings", "create", "mine/v1", "--model", "m", "--split-turns", "--template-errors", "skip"
    )
    assert result.exit_code == 0, result.output
    assert seen[0].split_turns
    assert seen[0].template_error_policy == TEMPLATE_ERROR_POLICY_SKIP
    assert "turn not written: a.jsonl:9: message 1" in result.stdout
    assert re.search(r"cannot be rendered +2", result.stdout)
    assert "next: luthier renderings errors r" in result.stderr


def test_renderings_that_fail_list_the_records_and_end_with_6(services: Any, run: Run) -> None:
    failed = Rendering(name="projects/default/renderings/r", state=Rendering.STATE_FAILED, num_errors=30)
    failed.error.code, failed.error.message = 3, "a.jsonl:1: no"
    errors = [
        RecordError(filename="a.jsonl", line=line, reason="TEMPLATE_INVALID", message="roles must alternate")
        for line in range(1, 31)
    ]
    services.answers.update(
        CreateRendering=lambda request, context: Rendering(name=failed.name),
        WatchRendering=lambda request, context: iter(()),
        GetRendering=lambda request, context: failed,
        ListRenderingErrors=lambda request, context: ListRenderingErrorsResponse(errors=errors),
    )
    result = run("renderings", "create", "mine/v1", "--model", "m")
    assert result.exit_code == 6
    assert re.search(r"a\.jsonl:20 +TEMPLATE_INVALID +roles must alternate", result.stderr)
    assert "a.jsonl:21" not in result.stderr
    assert "luthier renderings errors r" in result.stderr
    listed = run("renderings", "errors", "r")
    assert listed.exit_code == 0
    assert "a.jsonl:30" in listed.stdout
