"""What workers said of a job, for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from click.testing import Result
from google.protobuf.timestamp_pb2 import Timestamp

from luthier.v1.event_pb2 import AttemptChange, Event, LogLine, MetricValues, StateChange
from luthier.v1.training_service_pb2 import ListFineTuningJobEventsResponse

Run = Callable[..., Result]
AT = Timestamp(seconds=1_000_000_000)
EVENTS = [
    Event(
        attempt=1, attempt_change=AttemptChange(kind=AttemptChange.KIND_STARTED, worker="w@1"), event_time=AT
    ),
    Event(attempt=1, log=LogLine(severity=LogLine.SEVERITY_INFO, text="reading rows"), event_time=AT),
    Event(attempt=1, step=1, metrics=MetricValues(values={"train_loss": 2.0}), event_time=AT),
    Event(
        attempt=1,
        step=7,
        log=LogLine(severity=LogLine.SEVERITY_WARNING, text="smaller passes"),
        event_time=AT,
    ),
    Event(
        attempt=1,
        attempt_change=AttemptChange(kind=AttemptChange.KIND_LOST, worker="w@1", message="it was silent"),
        event_time=AT,
    ),
    Event(attempt=2, log=LogLine(severity=LogLine.SEVERITY_ERROR, text="bad \x1b[31m"), event_time=AT),
    Event(state_change=StateChange(state="SUCCEEDED"), event_time=AT),
]


@pytest.fixture
def run_logs(services: Any, run: Run) -> Run:
    def watch(request: Any, context: Any) -> Iterator[Event]:
        for sequence, event in enumerate(EVENTS, start=1):
            numbered = Event(sequence=sequence)
            numbered.MergeFrom(event)
            yield numbered

    services.answers["ListFineTuningJobEvents"] = lambda request, context: ListFineTuningJobEventsResponse(
        events=EVENTS
    )
    services.answers["WatchFineTuningJob"] = watch
    return run


def test_lines_say_when_how_serious_where_and_what(run_logs: Run) -> None:
    result = run_logs("jobs", "logs", "one")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        "2001-09-09 01:46:40  INFO     attempt 1  attempt 1 started on w@1",
        "2001-09-09 01:46:40  INFO     attempt 1  reading rows",
        "2001-09-09 01:46:40  WARNING  attempt 1 step 7  smaller passes",
        "2001-09-09 01:46:40  WARNING  attempt 1  attempt 1 lost on w@1: it was silent",
        "2001-09-09 01:46:40  ERROR    attempt 2  bad \\x1b[31m",
    ]


@pytest.mark.parametrize(
    ("words", "texts"),
    [
        (("--severity", "warning"), ["smaller passes", "lost on", "bad"]),
        (("--severity", "error"), ["bad"]),
        (("--attempt", "2"), ["bad"]),
        (("--follow", "--severity", "error"), ["bad"]),
        (("--attempt", "3"), []),
    ],
)
def test_lines_are_chosen(run_logs: Run, words: tuple[str, ...], texts: list[str]) -> None:
    result = run_logs("jobs", "logs", "one", *words)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert len(lines) == len(texts)
    assert all(text in line for text, line in zip(texts, lines, strict=True))
    assert ("nothing was said of one" in result.stderr) == (not texts)


def test_what_is_no_longer_kept_is_not_taken_for_silence(services: Any, run: Run) -> None:
    last = Event(sequence=41, state_change=StateChange(state="SUCCEEDED"), event_time=AT)
    services.answers["ListFineTuningJobEvents"] = lambda request, context: ListFineTuningJobEventsResponse(
        events=[last]
    )
    result = run("jobs", "logs", "one")
    assert result.exit_code == 0, result.output
    assert "what was said of one before event 41 is no longer kept" in result.stderr


def test_for_programs_they_are_events(run_logs: Run) -> None:
    result = run_logs("jobs", "logs", "one", "--json", "--severity", "warning")
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert [sorted(set(event) & {"log", "attempt_change"}) for event in events] == [
        ["log"],
        ["attempt_change"],
        ["log"],
    ]
