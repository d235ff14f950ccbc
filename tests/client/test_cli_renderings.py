"""`luthier renderings` against fake services: settings that are sent, findings and refused records that are shown."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from click.testing import Result

from luthier.v1.data_service_pb2 import ListRenderingErrorsResponse, PreviewRenderingResponse
from luthier.v1.dataset_pb2 import SPLIT_TRAIN, RecordError
from luthier.v1.rendering_pb2 import (
    RENDERING_KIND_PREFERENCE,
    TEMPLATE_ERROR_POLICY_SKIP,
    LengthStatistics,
    RenderedRow,
    RenderedToken,
    Rendering,
    RenderingFinding,
    RenderingFindingRecord,
    RenderingRoleStatistics,
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


def test_renderings_create_of_a_kind_sends_it_and_shows_rows_by_role(services: Any, run: Run) -> None:
    seen: list[Rendering] = []

    def create(request: Any, context: Any) -> Rendering:
        seen.append(request.rendering)
        return Rendering(name="projects/default/renderings/r")

    lengths = LengthStatistics(count=2, sum=51, maximum=30)
    role = RenderingRoleStatistics(role="rejected", tokens=lengths, num_truncated=7)
    ready = Rendering(
        name="projects/default/renderings/r",
        state=Rendering.STATE_READY,
        kind=RENDERING_KIND_PREFERENCE,
        split_statistics=[RenderingSplitStatistics(split=SPLIT_TRAIN, tokens=lengths, roles=[role])],
    )
    services.answers.update(
        CreateRendering=create,
        WatchRendering=lambda request, context: iter(()),
        GetRendering=lambda request, context: ready,
    )
    result = run("renderings", "create", "mine/v1", "--model", "m", "--kind", "preference")
    assert result.exit_code == 0, result.output
    assert seen[0].kind == RENDERING_KIND_PREFERENCE
    assert re.search(r"kind +preference", result.stdout)
    assert re.search(r"train +rejected +2 +51 +0 +0 +30 +0 +7", result.stdout)
    assert "renderings preview r" in result.stderr
    assert "jobs plan" not in result.stderr


def _side(row: int, role: str, text: str, shared: int = 0) -> RenderedRow:
    tokens = [RenderedToken(text="asked ")] if not shared else []
    return RenderedRow(
        row=row,
        unit=row // 2 * 2,
        role=role,
        filename="a.jsonl",
        line=row // 2 + 1,
        tokens=[*tokens, RenderedToken(text=text, supervised=True)],
        num_shared_tokens=shared,
    )


def test_renderings_preview_shows_both_sides_of_a_pair_and_the_prompt_once(services: Any, run: Run) -> None:
    sides = [_side(0, "chosen", "good"), _side(1, "rejected", "bad", shared=1)]
    more = [_side(2, "chosen", "better"), _side(3, "rejected", "worse", shared=1)]
    asked: list[int] = []

    def preview(request: Any, context: Any) -> PreviewRenderingResponse:
        asked.append(request.page_size)
        return PreviewRenderingResponse(rows=[*sides, *more])

    services.answers["PreviewRendering"] = preview
    result = run("renderings", "preview", "r", "--limit", "1")
    assert asked == [1]
    assert "row 0  chosen    a.jsonl:1  2 tokens, 1 learnt" in result.stdout
    assert "row 1  rejected    a.jsonl:1  2 tokens, 1 learnt, the first 1 as in row 0" in result.stdout
    assert (result.stdout.count("asked"), "good" in result.stdout, "bad" in result.stdout) == (1, True, True)
    assert "better" not in result.stdout


def test_renderings_show_says_which_day_the_template_saw(services: Any, run: Run) -> None:
    services.answers["GetRendering"] = lambda request, context: Rendering(
        name=request.name, state=Rendering.STATE_READY, template_date="2026-03-14"
    )
    shown = run("renderings", "show", "r")
    assert re.search(r"^ *today is +2026-03-14 *$", shown.stdout, re.MULTILINE), shown.output
