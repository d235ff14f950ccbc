"""The public API keeps Google's API improvement proposals (aip.dev): a walk over every descriptor."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.api import field_behavior_pb2, field_info_pb2, resource_pb2
from google.protobuf.descriptor import (
    Descriptor,
    EnumDescriptor,
    FieldDescriptor,
    FileDescriptor,
    MethodDescriptor,
    ServiceDescriptor,
)

import luthier.v1
from luthier.errors import Reason
from luthier.v1 import error_reason_pb2

FOLDER = Path(luthier.v1.__file__).parent
READ_VERBS = ("Get", "List", "Watch", "Read", "Preview", "Plan", "Download", "Generate", "Grade", "Score")
STREAMED_MUTATIONS = {"WriteUpload"}


def files() -> list[FileDescriptor]:
    names = sorted(path.stem for path in FOLDER.glob("*_pb2.py"))
    return [importlib.import_module(f"luthier.v1.{name}").DESCRIPTOR for name in names]


def messages() -> Iterator[Descriptor]:
    pending = [message for file in files() for message in file.message_types_by_name.values()]
    while pending:
        message = pending.pop()
        if not message.GetOptions().map_entry:
            yield message
            pending.extend(message.nested_types)


def enums() -> Iterator[EnumDescriptor]:
    for file in files():
        yield from file.enum_types_by_name.values()
    for message in messages():
        yield from message.enum_types


def services() -> list[ServiceDescriptor]:
    return [service for file in files() for service in file.services_by_name.values()]


def named(things: Iterator[Descriptor] | list[Descriptor]) -> dict[str, Descriptor]:
    return {message.name: message for message in things}


MESSAGES = sorted(messages(), key=lambda message: message.full_name)
RESOURCES = [message for message in MESSAGES if message.GetOptions().HasExtension(resource_pb2.resource)]
METHODS = [method for service in services() for method in service.methods]


def full_name(thing: Descriptor | MethodDescriptor | EnumDescriptor) -> str:
    return str(thing.full_name)


def behaviors(field: FieldDescriptor) -> list[int]:
    return list(field.GetOptions().Extensions[field_behavior_pb2.field_behavior])


def verb_of(method: MethodDescriptor) -> str:
    match = re.match(r"[A-Z][a-z]+", method.name)
    assert match is not None
    return match.group()


def is_read(method: MethodDescriptor) -> bool:
    return verb_of(method) in READ_VERBS


@pytest.mark.parametrize("message", MESSAGES, ids=full_name)
def test_every_field_says_how_it_behaves(message: Descriptor) -> None:
    """AIP-203."""
    for field in message.fields:
        assert len(behaviors(field)) == 1, f"{field.full_name} needs exactly one field_behavior"


@pytest.mark.parametrize("message", MESSAGES, ids=full_name)
def test_fields_are_named_plainly(message: Descriptor) -> None:
    """AIP-140, AIP-142: snake_case; times end in _time; durations and sizes carry their unit."""
    for field in message.fields:
        assert re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", field.name), field.full_name
        of_time = field.message_type is not None and field.message_type.name == "Timestamp"
        assert of_time == field.name.endswith("_time"), field.full_name


@pytest.mark.parametrize("resource", RESOURCES, ids=full_name)
def test_resources_have_the_standard_fields(resource: Descriptor) -> None:
    """AIP-122, AIP-123, AIP-148, AIP-154."""
    fields = resource.fields_by_name
    assert behaviors(fields["name"]) == [field_behavior_pb2.IDENTIFIER]
    assert fields["name"].number == 1
    annotation = resource.GetOptions().Extensions[resource_pb2.resource]
    assert annotation.type == f"luthier.dev/{resource.name}"
    assert re.fullmatch(r"projects/\{project\}(/[a-zA-Z]+/\{[a-z_]+\})+", annotation.pattern[0])
    for name in ("uid", "create_time"):
        assert behaviors(fields[name]) == [field_behavior_pb2.OUTPUT_ONLY], name
    if resource.name != "Checkpoint":  # never changes once it exists
        for name in ("update_time", "etag"):
            assert behaviors(fields[name]) == [field_behavior_pb2.OUTPUT_ONLY], name


@pytest.mark.parametrize("resource", RESOURCES, ids=full_name)
def test_states_are_output_only_and_nested(resource: Descriptor) -> None:
    """AIP-216."""
    field = resource.fields_by_name.get("state")
    if field is not None:
        assert behaviors(field) == [field_behavior_pb2.OUTPUT_ONLY]
        assert field.enum_type is not None
        assert field.enum_type.full_name == f"{resource.full_name}.State"


ENUMS = sorted(enums(), key=lambda enum: str(enum.full_name))


@pytest.mark.parametrize("enum", ENUMS, ids=full_name)
def test_enums_begin_with_unspecified(enum: EnumDescriptor) -> None:
    """AIP-126."""
    prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", enum.name).upper()
    assert enum.values_by_number[0].name == f"{prefix}_UNSPECIFIED"
    assert all(value.name.startswith(prefix + "_") for value in enum.values)


@pytest.mark.parametrize("method", METHODS, ids=full_name)
def test_methods_have_their_own_request(method: MethodDescriptor) -> None:
    """AIP-131 to AIP-136."""
    assert method.input_type.name == f"{method.name}Request"


@pytest.mark.parametrize("method", METHODS, ids=full_name)
def test_reads_are_marked_and_mutations_take_a_request_id(method: MethodDescriptor) -> None:
    """AIP-155, and idempotency_level for the retry policy of clients."""
    safe = method.GetOptions().idempotency_level == 1
    assert safe == is_read(method)
    field = method.input_type.fields_by_name.get("request_id")
    if is_read(method) or method.name in STREAMED_MUTATIONS:
        assert field is None
    else:
        assert field is not None, "a mutation needs request_id"
        assert (
            field.GetOptions().Extensions[field_info_pb2.field_info].format == field_info_pb2.FieldInfo.UUID4
        )


@pytest.mark.parametrize("method", [one for one in METHODS if verb_of(one) == "Get"], ids=full_name)
def test_get_takes_a_name_and_returns_the_resource(method: MethodDescriptor) -> None:
    """AIP-131."""
    assert method.output_type.name == method.name.removeprefix("Get")
    assert [field.name for field in method.input_type.fields] == ["name"]
    assert behaviors(method.input_type.fields[0]) == [field_behavior_pb2.REQUIRED]


@pytest.mark.parametrize("method", [one for one in METHODS if verb_of(one) == "List"], ids=full_name)
def test_list_pages(method: MethodDescriptor) -> None:
    """AIP-132, AIP-158."""
    wanted = method.input_type.fields_by_name
    assert behaviors(wanted["parent"]) == [field_behavior_pb2.REQUIRED]
    assert wanted["page_size"].type == FieldDescriptor.TYPE_INT32
    assert wanted["page_token"].type == FieldDescriptor.TYPE_STRING
    assert method.output_type.name == f"{method.name}Response"
    page = method.output_type.fields
    assert page[0].is_repeated
    assert method.output_type.fields_by_name["next_page_token"].type == FieldDescriptor.TYPE_STRING


@pytest.mark.parametrize("method", [one for one in METHODS if verb_of(one) == "Create"], ids=full_name)
def test_create_takes_parent_resource_and_id(method: MethodDescriptor) -> None:
    """AIP-133."""
    resource = method.name.removeprefix("Create")
    field = re.sub(r"(?<!^)(?=[A-Z])", "_", resource).lower()
    names = [one.name for one in method.input_type.fields]
    assert names[:3] == ["parent", field, f"{field}_id"]
    assert method.output_type.name == resource


@pytest.mark.parametrize("method", [one for one in METHODS if verb_of(one) == "Watch"], ids=full_name)
def test_watch_streams_numbered_events(method: MethodDescriptor) -> None:
    assert method.server_streaming
    assert method.output_type.full_name == "luthier.v1.Event"
    assert method.input_type.fields_by_name["start_sequence"].type == FieldDescriptor.TYPE_INT64


@pytest.mark.parametrize("message", MESSAGES, ids=full_name)
def test_what_begins_at_a_number_can_say_whose_number_it_is(message: Descriptor) -> None:
    """The name of what was deleted may be another resource's when a stream is resumed."""
    if any(field.name.startswith("start_") for field in message.fields if field.type == field.TYPE_INT64):
        assert message.fields_by_name["uid"].number == 20
        assert behaviors(message.fields_by_name["uid"]) == [field_behavior_pb2.OPTIONAL]


@pytest.mark.parametrize("resource", RESOURCES, ids=full_name)
def test_references_name_an_existing_resource_type(resource: Descriptor) -> None:
    """AIP-122: every resource_reference points at a type that some message declares."""
    types = {f"luthier.dev/{one.name}" for one in RESOURCES}
    for message in MESSAGES:
        for field in message.fields:
            reference = field.GetOptions().Extensions[resource_pb2.resource_reference].type
            assert not reference or reference in {*types, "*"}, field.full_name


def test_every_reason_a_service_gives_is_registered() -> None:
    """AIP-193: one enum of reasons, the same on the wire and in the error tree."""
    registered = {
        name.removeprefix("ERROR_REASON_")
        for name in error_reason_pb2.ErrorReason.keys()  # noqa: SIM118 - an enum wrapper is no mapping
    }
    assert registered - {"UNSPECIFIED"} == {reason.value for reason in Reason}


def test_every_rpc_documents_its_errors() -> None:
    folder = FOLDER.parents[3] / "protos" / "luthier" / "v1"
    source = "\n".join(path.read_text() for path in sorted(folder.glob("*_service.proto")))
    for method in METHODS:
        comment = re.search(rf"((?:  //[^\n]*\n)+)  rpc {method.name}\(", source)
        assert comment is not None, method.full_name
        assert "Errors:" in comment.group(1), method.full_name
