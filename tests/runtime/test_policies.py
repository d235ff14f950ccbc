"""Policies: who may call each method, and what each is about; one that leaves either open is none."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass

from luthier.errors import InvalidArgument, PermissionDenied
from luthier.runtime.auth import Principal, confine
from luthier.runtime.policies import Rule, policy_for, policy_of
from luthier.v1 import evaluation_service_pb2, model_service_pb2, reward_service_pb2

SERVICE = model_service_pb2.DESCRIPTOR.services_by_name["ModelService"]
EVALUATION = evaluation_service_pb2.DESCRIPTOR.services_by_name["EvaluationService"]
REWARD = reward_service_pb2.DESCRIPTOR.services_by_name["RewardService"]
"""Its requests name no resource."""
NAMES = [method.name for method in SERVICE.methods]
GENERATING = {"GenerateText": "model", "ScoreTexts": "model"}


def test_a_policy_says_once_what_each_method_does() -> None:
    policy = policy_of(SERVICE, reads=NAMES[1:], changes=NAMES[:1], tasks=NAMES[1:2])
    assert policy[f"/{SERVICE.full_name}/{NAMES[0]}"].roles == {"writer"}
    assert policy[f"/{SERVICE.full_name}/{NAMES[1]}"].roles == {"reader", "task"}
    assert policy[f"/{SERVICE.full_name}/{NAMES[2]}"].roles == {"reader"}
    assert len(policy) == len(NAMES)


@pytest.mark.parametrize(
    ("said", "wrong"),
    [
        ({"reads": NAMES[1:], "changes": ()}, NAMES[0]),
        ({"reads": NAMES, "changes": NAMES[:1]}, NAMES[0]),
        ({"reads": NAMES, "changes": ("Nothing",)}, "Nothing"),
        ({"reads": NAMES, "changes": (), "tasks": ("Nothing",)}, "Nothing"),
    ],
)
def test_a_policy_that_leaves_a_method_out_or_says_two_things_is_none(
    said: dict[str, Any], wrong: str
) -> None:
    with pytest.raises(AssertionError, match=wrong):
        policy_of(SERVICE, **said)


def test_what_a_call_is_about_stands_in_its_name_or_its_parent() -> None:
    policy = policy_for(SERVICE, "reader")
    assert policy["/luthier.v1.ModelService/GetModel"].subject == "name"
    assert policy["/luthier.v1.ModelService/ListModels"].subject == "parent"
    assert {rule.subjectless for rule in policy.values()} == {""}


def test_a_method_that_is_about_nothing_must_say_why() -> None:
    with pytest.raises(AssertionError, match=r"RewardService must say .* or why none does, see \['Score'\]"):
        policy_for(REWARD, "reader")
    policy = policy_for(REWARD, "reader", subjectless={"Score": "users serve it"})
    assert policy == {
        "/luthier.v1.RewardService/Score": Rule(roles=frozenset({"reader"}), subjectless="users serve it")
    }


@pytest.mark.parametrize(
    ("said", "wrong"),
    [
        ({"subjectless": {"GetModel": "it names one"}}, r"see \['GetModel'\]"),
        ({"subjectless": {"Nothing": "no such method"}}, r"see \['Nothing'\]"),
        ({"subjects": {"Nothing": "name"}}, r"see \['Nothing'\]"),
        (
            {"subjects": {"GetModel": "uid"}},
            "GetModel must be about a field .* names a resource, got 'uid' beside 'name'",
        ),
    ],
)
def test_what_is_said_of_a_method_that_is_not_so_is_refused(said: dict[str, Any], wrong: str) -> None:
    with pytest.raises(AssertionError, match=wrong):
        policy_for(SERVICE, "reader", **said)


@pytest.mark.parametrize("field", ["text", "max_tokens", "", "model.name"])
def test_a_call_is_about_a_field_that_names_a_resource_or_the_policy_is_none(field: str) -> None:
    assert policy_for(EVALUATION, "generator", subjects=GENERATING)
    with pytest.raises(AssertionError, match="GenerateText"):
        policy_for(EVALUATION, "generator", subjects={**GENERATING, "GenerateText": field})
    with pytest.raises(AssertionError, match=r"see \['GenerateText'\]"):
        policy_for(EVALUATION, "generator", subjects={"ScoreTexts": "model"})


def test_a_rule_has_a_subject_or_the_reason_why_it_has_none() -> None:
    for said in ({}, {"subject": "name", "subjectless": "but it has"}):
        with pytest.raises(AssertionError, match="must have a subject"):
            Rule(roles=frozenset(), **said)


def updating(name: str, *fields: str) -> ServiceDescriptor:
    """A service whose one method updates a dataset; `fields` are texts that its request has beside it."""
    file = descriptor_pb2.FileDescriptorProto(
        name=f"test/{name}.proto",
        package=f"test.{name}",
        syntax="proto3",
        dependency=["luthier/v1/dataset.proto"],
    )
    request = file.message_type.add(name="UpdateDatasetRequest")
    dataset = request.field.add(name="dataset", number=1, type_name=".luthier.v1.Dataset")
    dataset.type = descriptor_pb2.FieldDescriptorProto.TYPE_MESSAGE
    for number, field in enumerate(fields, start=2):
        request.field.add(name=field, number=number, type=descriptor_pb2.FieldDescriptorProto.TYPE_STRING)
    method = file.service.add(name="Service").method.add(name="UpdateDataset")
    method.input_type, method.output_type = f".test.{name}.UpdateDatasetRequest", ".luthier.v1.Dataset"
    pool = descriptor_pool.Default()
    pool.AddSerializedFile(file.SerializeToString())
    return pool.FindServiceByName(f"test.{name}.Service")


def test_an_update_is_about_what_it_updates() -> None:
    service = updating("updates")
    (rule,) = policy_for(service, "writer").values()
    assert rule.subject == "dataset.name"
    ours = Principal(kind="key", subject="k", projects=frozenset({"ours"}))
    request: Any = GetMessageClass(service.methods[0].input_type)()
    form = r"projects/\{project\}/datasets/\{dataset\}"
    with pytest.raises(
        InvalidArgument, match=f"dataset.name: must say what the call is about: {form}, got ''"
    ):
        confine(ours, request, rule)
    request.dataset.name = "projects/ours/datasets/d"
    confine(ours, request, rule)
    request.dataset.name = "projects/theirs/datasets/d"
    with pytest.raises(PermissionDenied, match="no access to projects/theirs"):
        confine(ours, request, rule)


def test_what_could_be_about_two_things_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"must be about one thing, it has parent, dataset\.name"):
        policy_for(updating("twice", "parent"), "writer")
