"""The door: the service's own fields cleared, what no handler could mean refused by name."""

from __future__ import annotations

import math
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, duration_pb2, message_factory, timestamp_pb2

from luthier.errors import InvalidArgument
from luthier.runtime.door import MAX_MESSAGES, MAX_VIOLATIONS, admit
from luthier.v1 import data_service_pb2, dataset_pb2, event_pb2, training_service_pb2
from luthier.worker.v1 import worker_service_pb2

Create = training_service_pb2.CreateFineTuningJobRequest


def refused(request: Any) -> list[tuple[str, str]]:
    with pytest.raises(InvalidArgument) as caught:
        admit(request)
    return [(violation.field, violation.description) for violation in caught.value.violations]


def test_what_is_the_services_to_write_is_cleared_and_the_rest_is_kept() -> None:
    request = Create(parent="projects/p")
    job = request.fine_tuning_job
    job.name = "projects/p/fineTuningJobs/mine"
    job.create_time.seconds = 1 << 60
    job.error.details.add(type_url="x/y.Z", value=b"\xff")
    job.latest_metrics["loss"] = math.nan
    job.display_name = "kept"
    job.hyperparameters.num_epochs = 3
    admit(request)
    wanted = Create(parent="projects/p")
    wanted.fine_tuning_job.display_name = "kept"
    wanted.fine_tuning_job.hyperparameters.num_epochs = 3
    assert request == wanted


def test_unknown_enum_numbers_are_refused_with_the_known_ones() -> None:
    request = data_service_pb2.CreateDatasetVersionRequest(parent="p")
    request.dataset_version.sources.add(format=9999)
    (field, description), *_ = refused(request)
    assert field == "dataset_version.sources[0].format"
    assert description == (
        "must be one of OPENAI_CHAT, PROMPT_COMPLETION, ALPACA, SHAREGPT, PREFERENCE_OPENAI, PREFERENCE, "
        "SHAREGPT_PREFERENCE, UNPAIRED, SHAREGPT_UNPAIRED, QUESTION_ANSWER, got number 9999"
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused(value: float) -> None:
    request = Create()
    request.fine_tuning_job.hyperparameters.learning_rate = value
    expected = f"must be a finite number, got {value}"
    assert refused(request) == [("fine_tuning_job.hyperparameters.learning_rate", expected)]
    assert refused(worker_service_pb2.ClaimTaskRequest(wait_seconds=value)) == [("wait_seconds", expected)]


def test_unknown_fields_are_refused_wherever_they_stand() -> None:
    raw = Create(parent="p").SerializeToString() + b"\x88\xfa\x01\x05"
    assert refused(Create.FromString(raw)) == [
        (
            "CreateFineTuningJobRequest",
            "must hold fields of luthier.v1.CreateFineTuningJobRequest only, got unknown field 4001",
        )
    ]
    number = Create.DESCRIPTOR.fields_by_name["fine_tuning_job"].number
    nested = Create.FromString(bytes([number << 3 | 2, 4]) + b"\x88\xfa\x01\x05")
    assert [field for field, _ in refused(nested)] == ["fine_tuning_job"]


def test_every_violation_is_named_up_to_a_limit() -> None:
    request = data_service_pb2.CreateDatasetVersionRequest()
    for _ in range(3 * MAX_VIOLATIONS):
        request.dataset_version.sources.add(format=9999)
    assert len(refused(request)) == MAX_VIOLATIONS


def test_lists_without_measure_are_refused_and_not_walked() -> None:
    request = data_service_pb2.CreateDatasetVersionRequest()
    request.dataset_version.sources.extend([dataset_pb2.DatasetSource()] * (MAX_MESSAGES + 1))
    ((_, description),) = refused(request)
    assert description == f"must hold at most {MAX_MESSAGES} values, got {MAX_MESSAGES + 1}"


def test_maps_without_measure_are_refused_and_not_walked() -> None:
    request = Create()
    graders = request.fine_tuning_job.reinforcement.grader.multi.graders
    for place in range(MAX_MESSAGES + 1):
        graders[str(place)].name = "g"
    ((field, description),) = refused(request)
    assert field == "fine_tuning_job.reinforcement.grader.multi.graders"
    assert description == f"must hold at most {MAX_MESSAGES} values, got {MAX_MESSAGES + 1}"


def test_what_workers_measured_is_kept() -> None:
    event = event_pb2.Event(sequence=9)
    event.metrics.values["train_loss"] = 0.5
    request = worker_service_pb2.ReportEventsRequest(task="t", epoch=1)
    request.events.add(local_number=1, event=event)
    before = request.SerializeToString(deterministic=True)
    admit(request)
    assert request.SerializeToString(deterministic=True) == before


def test_what_workers_measured_is_finite_in_every_map() -> None:
    event = event_pb2.Event()
    event.metrics.values["train_loss"] = math.nan
    report = worker_service_pb2.ReportEventsRequest()
    report.events.add(event=event)
    commit = worker_service_pb2.CommitCheckpointRequest(metrics={"a": 1.0, "b": math.inf})
    assert refused(report) == [
        ("events[0].event.metrics.values['train_loss']", "must be a finite number, got nan")
    ]
    assert refused(commit) == [("metrics['b']", "must be a finite number, got inf")]


@pytest.mark.parametrize("package", ["luthier.test.v1", "luthier.worker.test.v1"])
def test_numbers_in_lists_are_finite(package: str) -> None:
    """None of our messages has such a list yet."""
    described = descriptor_pb2.FileDescriptorProto(name=f"{package}.proto", package=package, syntax="proto3")
    kind = descriptor_pb2.FieldDescriptorProto
    described.message_type.add(name="Measured").field.add(
        name="values", number=1, type=kind.TYPE_DOUBLE, label=kind.LABEL_REPEATED
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(described)
    measured = message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.Measured"))
    assert refused(measured(values=[1.0, -math.inf, math.nan])) == [
        ("values[1]", "must be a finite number, got -inf"),
        ("values[2]", "must be a finite number, got nan"),
    ]


def test_a_time_that_no_calendar_has_is_refused() -> None:
    event = event_pb2.Event()
    event.event_time.seconds = 1 << 60
    request = worker_service_pb2.ReportEventsRequest()
    request.events.add(event=event)
    ((field, description),) = refused(request)
    assert field == "events[0].event.event_time"
    assert f"got seconds {1 << 60}" in description


YEARS = 315_576_000_000


@pytest.mark.parametrize(
    ("kind", "seconds", "nanos", "is_right"),
    [
        ("Timestamp", -62_135_596_800, 0, True),
        ("Timestamp", 253_402_300_799, 999_999_999, True),
        ("Timestamp", -1, 1, True),
        ("Timestamp", 253_402_300_800, 0, False),
        ("Timestamp", -62_135_596_801, 999_999_999, False),
        ("Timestamp", 0, 10**9, False),
        ("Timestamp", 1, -1, False),
        ("Duration", YEARS, 999_999_999, True),
        ("Duration", -YEARS, -999_999_999, True),
        ("Duration", 0, -1, True),
        ("Duration", YEARS + 1, 0, False),
        ("Duration", -YEARS - 1, 0, False),
        ("Duration", 1, 10**9, False),
        ("Duration", 0, -(10**9), False),
        ("Duration", 1, -1, False),
        ("Duration", -1, 1, False),
    ],
)
def test_times_and_durations_are_what_their_types_promise(
    kind: str, seconds: int, nanos: int, is_right: bool
) -> None:
    """None of our messages has a duration yet."""
    of_field = descriptor_pb2.FieldDescriptorProto
    described = descriptor_pb2.FileDescriptorProto(
        name="luthier.timed.proto", package="luthier.timed", syntax="proto3"
    )
    pool = descriptor_pool.DescriptorPool()
    for known in (timestamp_pb2, duration_pb2):
        pool.AddSerializedFile(known.DESCRIPTOR.serialized_pb)
        described.dependency.append(known.DESCRIPTOR.name)
    described.message_type.add(name="Timed").field.add(
        name="at", number=1, type=of_field.TYPE_MESSAGE, type_name=f".google.protobuf.{kind}"
    )
    pool.Add(described)
    timed: Any = message_factory.GetMessageClass(pool.FindMessageTypeByName("luthier.timed.Timed"))()
    timed.at.seconds, timed.at.nanos = seconds, nanos
    if is_right:
        admit(timed)
    else:
        ((field, description),) = refused(timed)
        assert field == "at"
        assert description.startswith("must have seconds in ")
        assert description.endswith(f", got seconds {seconds}, nanos {nanos}")
