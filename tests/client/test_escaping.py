"""Text of others cannot steer the terminal of who reads it, wherever the client writes it."""

from __future__ import annotations

import html
import io
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st
from rich.text import Text

from luthier.client.cli.console import EscapingConsole
from luthier.client.cli.live import events, transfer
from luthier.client.cli.session import Session
from luthier.client.escaping import escaped, escaped_html, escaped_json, escaped_line
from luthier.client.report import ReportData, render_report
from luthier.client.transfers import TransferProgress
from luthier.v1.chat_pb2 import ChatMessage, Conversation
from luthier.v1.data_service_pb2 import (
    ListDatasetsResponse,
    ListDatasetVersionErrorsResponse,
    ListRecordsResponse,
    PreviewRenderingResponse,
)
from luthier.v1.dataset_pb2 import Dataset, Record, RecordError
from luthier.v1.evaluation_pb2 import ArmPrediction, Evaluation, Prediction
from luthier.v1.evaluation_service_pb2 import GenerateTextResponse, ListPredictionsResponse
from luthier.v1.event_pb2 import Event, LogLine, StateChange
from luthier.v1.event_pb2 import Progress as ProgressEvent
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob
from luthier.v1.rendering_pb2 import RenderedRow, RenderedToken

Run = Callable[..., Result]
HOSTILE = "\x1b[31mred\x1b]0;owned\x07\x9b2J\u202eexe\u2066\x7f\x00[bold]x[/bold] :smile:"
STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""What must not come out. Files that are no terminals get no styles, so that not one such byte is rich's own."""


@given(st.text() | st.text(st.characters(max_codepoint=0x20FF)))
def test_escaped_text_steers_nothing_and_plain_text_stays(text: str) -> None:
    for shown in (escaped(text), escaped_line(text), html.unescape(escaped_html(text))):
        assert not STEERING.search(shown)
    assert "\n" not in escaped_line(text)
    if not STEERING.search(text):
        assert escaped(text) == text


@given(st.text())
def test_escaped_json_means_the_same(text: str) -> None:
    written = escaped_json(json.dumps({text: [text]}, ensure_ascii=False))
    assert not STEERING.search(written)
    assert json.loads(written) == {text: [text]}


def test_escaped_text_says_what_stood_there() -> None:
    assert escaped("a\x1b[31m\x9b\u202e\tb\nc\r") == "a\\x1b[31m\\x9b\\u202e\tb\nc\\r"


def _record(request: Any, context: Any) -> ListRecordsResponse:
    turn = ChatMessage(role=HOSTILE, content=HOSTILE)
    return ListRecordsResponse(records=[Record(filename=HOSTILE, conversation=Conversation(messages=[turn]))])


def _prediction(request: Any, context: Any) -> ListPredictionsResponse:
    answer = ArmPrediction(arm_id=HOSTILE, text=HOSTILE)
    prompt = [ChatMessage(role="user", content=HOSTILE)]
    return ListPredictionsResponse(
        predictions=[Prediction(prompt=prompt, reference=HOSTILE, answers=[answer])]
    )


def _error(request: Any, context: Any) -> ListDatasetVersionErrorsResponse:
    error = RecordError(filename=HOSTILE, path=HOSTILE, reason=HOSTILE, message=HOSTILE, value=HOSTILE)
    return ListDatasetVersionErrorsResponse(errors=[error])


def _row(request: Any, context: Any) -> PreviewRenderingResponse:
    return PreviewRenderingResponse(
        rows=[RenderedRow(filename=HOSTILE, tokens=[RenderedToken(text=HOSTILE)])]
    )


def _failed_job(request: Any, context: Any) -> FineTuningJob:
    job = FineTuningJob(name=f"projects/default/fineTuningJobs/{HOSTILE}", labels={HOSTILE: HOSTILE})
    job.run_record.device = HOSTILE
    job.error.message = HOSTILE
    return job


ANSWERS: dict[tuple[str, ...], tuple[str, Callable[[Any, Any], Any]]] = {
    ("datasets", "list"): (
        "ListDatasets",
        lambda request, context: ListDatasetsResponse(
            datasets=[
                Dataset(name="projects/default/datasets/d", display_name=HOSTILE, labels={"a": HOSTILE})
            ]
        ),
    ),
    ("datasets", "records", "d/v1"): ("ListRecords", _record),
    ("datasets", "errors", "d/v1"): ("ListDatasetVersionErrors", _error),
    ("renderings", "preview", "r"): ("PreviewRendering", _row),
    ("jobs", "show", "j"): ("GetFineTuningJob", _failed_job),
    ("evaluations", "predictions", "e"): ("ListPredictions", _prediction),
}


@pytest.mark.parametrize("words", ANSWERS, ids=" ".join)
@pytest.mark.parametrize("as_json", [False, True])
def test_what_services_say_is_written_out(
    services: Any, run: Run, words: tuple[str, ...], as_json: bool
) -> None:
    method, answer = ANSWERS[words]
    services.answers[method] = answer
    result = run(*words, *(["--json"] if as_json else []))
    assert result.exit_code == 0, result.output
    assert not STEERING.search(result.stdout)
    shown = json.dumps(json.loads(result.stdout), ensure_ascii=False) if as_json else result.stdout
    if as_json:
        assert json.dumps(HOSTILE, ensure_ascii=False)[1:-1] in shown
    else:
        assert "x1b[31mred" in re.sub(r"\s", "", shown)
        # Also the end: what is written out is not cut off by a column that was measured before.
        assert ":smile:" in re.sub(r"\s", "", shown)


def test_errors_are_written_out(services: Any, run: Run) -> None:
    services.answers["GetFineTuningJob"] = lambda request, context: services.refuse(
        context,
        grpc.StatusCode.INVALID_ARGUMENT,
        "a message with \u202e and \x9b",
        reason="INVALID_FIELD",
        metadata={"request_id": HOSTILE},
        violations=((HOSTILE, HOSTILE), ("b", HOSTILE)),
    )
    result = run("jobs", "show", "j")
    assert result.exit_code == 1
    assert not STEERING.search(result.stderr)
    assert "x1b[31mred" in result.stderr


def test_streamed_answers_keep_their_lines_and_steer_nothing(services: Any, run: Run) -> None:
    def generate(request: Any, context: Any) -> Iterator[GenerateTextResponse]:
        for text in ("one\n\ttwo ", "\x1b", "[31mred", HOSTILE):
            yield GenerateTextResponse(text=text)

    services.answers["GenerateText"] = generate
    output = run("generate", "--model", "m", "hello").stdout
    assert output.startswith("one\n\ttwo \\x1b[31mred")
    assert not STEERING.search(output)


def test_watched_events_are_written_out(services: Any, run: Run) -> None:
    def watch(request: Any, context: Any) -> Iterator[Event]:
        yield Event(sequence=1, log=LogLine(severity=LogLine.SEVERITY_WARNING, text=HOSTILE))
        yield Event(sequence=2, progress=ProgressEvent(phase=HOSTILE, completed=1, total=2, unit=HOSTILE))
        yield Event(sequence=3, state_change=StateChange(state="SUCCEEDED", message=HOSTILE))

    services.answers["WatchFineTuningJob"] = watch
    services.answers["GetFineTuningJob"] = lambda request, context: FineTuningJob(
        name="projects/default/fineTuningJobs/j", state=FineTuningJob.STATE_SUCCEEDED
    )
    result = run("jobs", "watch", "j")
    assert "x1b[31mred" in result.stderr
    assert not STEERING.search(result.output)


class TerminalSession(Session):
    """A session whose stderr is a terminal that the test can read."""

    def __init__(self) -> None:
        super().__init__()
        self.stream = io.StringIO()
        self._terminal = EscapingConsole(
            file=self.stream,
            force_terminal=True,
            width=500,
            markup=False,
            emoji=False,
            _environ={"NO_COLOR": "1"},
        )

    @property
    def err(self) -> EscapingConsole:
        return self._terminal


def test_animated_lines_show_hostile_text_and_move_the_cursor_themselves_alone() -> None:
    session = TerminalSession()
    with events(session, f"projects/default/fineTuningJobs/{HOSTILE}") as show:
        show(Event(progress=ProgressEvent(phase=HOSTILE, completed=1, total=2, unit="steps")))
        show(Event(log=LogLine(severity=LogLine.SEVERITY_WARNING, text=HOSTILE)))
    with transfer(session, f"upload {HOSTILE}:") as update:
        update(TransferProgress(name="projects/default/uploads/u", completed_bytes=1, total_bytes=2))
    written = session.stream.getvalue()
    assert "[bold]x[/bold] :smile:" in written
    assert r"\x1b[31mred" in written
    for sequence in ("\x1b[31mred", "\x1b]0;", "\x9b", "\u202e", "\u2066", "\x07"):
        assert sequence not in written


def test_console_keeps_its_own_styles() -> None:
    stream = io.StringIO()
    console = EscapingConsole(
        file=stream, force_terminal=True, color_system="standard", width=80, _environ={}
    )
    console.print(Text.assemble("a\x1b[2J", ("fine", "green"), "\x9b"))
    assert stream.getvalue() == "a\\x1b[2J\x1b[32mfine\x1b[0m\\x9b\n"


def test_markup_in_names_is_text(services: Any, run: Run) -> None:
    dataset = Dataset(name="projects/default/datasets/d", display_name="[red]sale[/red] :smile: [/]")
    services.answers["ListDatasets"] = lambda request, context: ListDatasetsResponse(datasets=[dataset])
    assert "[red]sale[/red] :smile: [/]" in run("datasets", "list").stdout


def test_the_report_shows_hostile_text_written_out() -> None:
    evaluation = Evaluation(name="projects/default/evaluations/e", display_name=HOSTILE)
    evaluation.arms.add(arm_id=HOSTILE, model=f"projects/default/models/{HOSTILE}")
    answers = [ArmPrediction(arm_id=HOSTILE, text=f"<b>{HOSTILE}")]
    predictions = [Prediction(prompt=[ChatMessage(role="user", content=HOSTILE)], answers=answers)]
    page = render_report(ReportData(evaluation=evaluation, predictions=predictions))
    assert not STEERING.search(page)
    assert r"&lt;b&gt;\x1b[31mred" in page
