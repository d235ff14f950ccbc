"""Messages in YAML and JSON, and assignments: the same for every message, by its descriptor alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.client.every_kind import EveryKind, fields_of, messages

from luthier.client.field_values import is_identifier, is_map, is_output_only
from luthier.client.message_files import assign, read_message
from luthier.errors import InvalidArgument
from luthier.v1.dataset_pb2 import Dataset, DatasetVersion
from luthier.v1.evaluation_pb2 import EVALUATION_METRIC_PERPLEXITY, Evaluation
from luthier.v1.fine_tuning_job_pb2 import LEARNING_RATE_SCHEDULE_COSINE, FineTuningJob
from luthier.v1.model_pb2 import Model
from luthier.v1.rendering_pb2 import Rendering

RESOURCES = (FineTuningJob, Rendering, Evaluation, DatasetVersion, Dataset, Model)


def _bytes(message: Message) -> bytes:
    # Not-a-numbers are not equal to themselves.
    return message.SerializeToString(deterministic=True)


@pytest.mark.parametrize("kind", [EveryKind, *RESOURCES], ids=lambda kind: kind.DESCRIPTOR.name)
@settings(max_examples=40)
@given(data=st.data())
def test_message_survives_json_and_yaml(kind: type[Message], data: st.DataObject) -> None:
    message = data.draw(messages(kind.DESCRIPTOR))
    has_wire_names = data.draw(st.booleans())
    value = json_format.MessageToDict(message, preserving_proto_field_name=has_wire_names)
    texts = {
        "a.json": json.dumps(
            value, ensure_ascii=data.draw(st.booleans()), indent=data.draw(st.sampled_from([None, 2]))
        ),
        "a.yaml": yaml.safe_dump(value, sort_keys=False),
    }
    for source, text in texts.items():
        reading = read_message(text.encode(), kind, source=source)
        assert _bytes(reading.message) == _bytes(message), text
        assert reading.ignored == ()


def _fill(message: Message, depth: int = 0) -> None:
    """Give every field a value, those of the service too."""
    for field in fields_of(message):
        if field.message_type is None and not field.is_repeated:
            setattr(message, field.name, {"string": "7", "bytes": b"7"}.get(_kind_name(field), 1))
        elif is_map(field):
            entries = getattr(message, field.name)
            if field.message_type.fields_by_name["value"].message_type is None:
                entries["7"] = "7" if field.message_type.fields_by_name["value"].cpp_type == 9 else 1
        elif field.message_type is None:
            getattr(message, field.name).append("7" if _kind_name(field) == "string" else 1)
        elif depth < 4 and field.message_type.full_name != "google.protobuf.Any":
            target = getattr(message, field.name)
            _fill(target.add() if field.is_repeated else target, depth + 1)


def _kind_name(field: FieldDescriptor) -> str:
    return "bytes" if field.type == FieldDescriptor.TYPE_BYTES else "string" if field.cpp_type == 9 else ""


def _without_output(message: Message) -> Message:
    copy = type(message)()
    copy.CopyFrom(message)
    for field in fields_of(message):
        value = getattr(copy, field.name)
        if is_output_only(field):
            copy.ClearField(field.name)
        elif field.message_type is not None and not is_map(field):
            is_set = field.is_repeated or copy.HasField(field.name)
            for one in value if field.is_repeated else [value] * is_set:
                one.CopyFrom(_without_output(one))
    return copy


@pytest.mark.parametrize("kind", RESOURCES, ids=lambda kind: kind.DESCRIPTOR.name)
def test_message_that_a_service_filled_is_read_without_what_is_the_services(kind: type[Message]) -> None:
    message = kind()
    _fill(message)
    text = json_format.MessageToJson(message, preserving_proto_field_name=True)
    reading = read_message(text.encode(), kind, source="a.json")
    assert reading.message == _without_output(message) != message
    at_top = {one.name for one in fields_of(kind) if is_output_only(one) or is_identifier(one)}
    assert {path for path in reading.ignored if "." not in path and "[" not in path} == at_top


def test_nested_output_only_fields_are_named_by_their_path() -> None:
    text = b"sources: [{upload: u}, {upload: v, filename: a.jsonl}]"
    reading = read_message(text, DatasetVersion, source="v.yaml")
    assert reading.ignored == ("sources[1].filename",)
    assert [source.upload for source in reading.message.sources] == ["u", "v"]


def test_words_are_read_as_their_field_has_them() -> None:
    text = """
base_model: "m\\u00e9"
display_name: Größe 😀
labels: {a: no, b: 1.10, c: 2026-11-28, d: null x, e: "null", on: off}
hyperparameters:
  learning_rate: 1e-4
  max_steps: 1e3
  learning_rate_schedule: cosine
  batch_rows: null
  batch_tokens: "512"
lora: {use_rslora: True, rank: ~}
"""
    job = read_message(text.encode(), FineTuningJob, source="job.yaml").message
    assert (job.base_model, job.display_name) == ("mé", "Größe 😀")
    assert dict(job.labels) == {
        "a": "no",
        "b": "1.10",
        "c": "2026-11-28",
        "d": "null x",
        "e": "null",
        "on": "off",
    }
    settings_ = job.hyperparameters
    assert (settings_.learning_rate, settings_.max_steps, settings_.batch_tokens) == (1e-4, 1000, 512)
    assert settings_.learning_rate_schedule == LEARNING_RATE_SCHEDULE_COSINE
    assert job.lora.use_rslora
    assert not job.lora.HasField("rank")


def _problem(text: str, source: str = "job.yaml") -> str:
    with pytest.raises(InvalidArgument) as raised:
        read_message(text.encode(), FineTuningJob, source=source)
    return raised.value.message


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("\nbase_modle: m", "job.yaml:2: base_modle is no field of FineTuningJob; did you mean base_model?"),
        ("learning_rate: 1", "is no field of FineTuningJob; did you mean hyperparameters.learning_rate?"),
        (
            "lora: {xyz: 1}",
            "lora.xyz is no field of LoraConfig; its fields: rank, alpha, target_modules, use_rslora, dropout, "
            "rank_pattern, alpha_pattern, trained_modules, use_dora, lora_plus_ratio",
        ),
        ("lora: {use_rslora: no}", "job.yaml:1: lora.use_rslora must be true or false, got no"),
        ("lora: {use_rslora: 'true'}", 'lora.use_rslora must be true or false, got "true"'),
        ("lora: {rank: 010}", "lora.rank must be a whole number from -2147483648 to 2147483647, got 010"),
        ("lora: {rank: 1_000}", "got 1_000"),
        ("lora: {rank: 3000000000}", "got 3000000000"),
        ("lora: {rank: 1.5}", "got 1.5"),
        (f"lora: {{rank: {'9' * 9000}}}", "999..."),
        ("lora: {rank: 1e999999999}", "got 1e999999999"),
        ("lora: {alpha: yes}", "lora.alpha must be a number, got yes"),
        ("lora: {alpha: 0x10}", "lora.alpha must be a number, got 0x10"),
        ("lora: {alpha: 1e999}", "lora.alpha must be a number of at most 1.8e+308, got 1e999"),
        ("lora: {alpha: 12:30}", "lora.alpha must be a number, got 12:30"),
        ("lora: 5", "job.yaml:1: lora must be the fields of one LoraConfig, got 5"),
        ("lora: {target_modules: q_proj}", "lora.target_modules must be a list, got q_proj"),
        (
            "lora: {target_modules: [a,\n ~]}",
            "job.yaml:2: lora.target_modules[1] must be a string, got ~",
        ),
        ("labels: [a]", "labels must be a mapping, got a list of 1"),
        ("labels: {a: , b: c}", "labels.a must be a string, got nothing"),
        ("labels: {a: null}", "labels.a must be a string, got null"),
        ("labels: {a: {b: c}}", "labels.a must be a string, got a mapping of 1"),
        ("labels: {a: 1,\n a: 2}", "job.yaml:2: labels.a is given twice"),
        ("base_model: a\nbaseModel: b", "job.yaml:2: base_model is given twice, first at job.yaml:1"),
        (
            "hyperparameters: {learning_rate_schedule: cosin}",
            "must be one of CONSTANT, LINEAR, COSINE, WARMUP_STABLE_DECAY (did you mean COSINE?), got cosin",
        ),
        (
            "hyperparameters: {learning_rate_schedule: 7}",
            "must be one of CONSTANT, LINEAR, COSINE, WARMUP_STABLE_DECAY, got 7",
        ),
        (
            "hyperparameters:\n  batch_rows: 1\n  batch_tokens: 2",
            "job.yaml:3: hyperparameters.batch_tokens excludes batch_rows, which is given at job.yaml:2: give one",
        ),
        ("[{base_model: m}]", "job.yaml:1: must be the fields of one FineTuningJob, got a list of 1"),
        ("<<: {base_model: m}", "<< is no field of FineTuningJob"),
        ('{"base_model": 5}', "base_model must be a string in quotes, got 5"),
        ('{"base_model": "\\ud83d"}', 'base_model must be a string, got "\\ud83d"'),
        ('{"labels": {"a": true}}', "labels.a must be a string in quotes, got true"),
        ('{"a\\u001b[31m\\u202e": 1}', "job.yaml:1: a\\x1b[31m\\u202e is no field of FineTuningJob"),
    ],
)
def test_read_message_says_where_what_and_what_would_be_right(text: str, problem: str) -> None:
    assert problem in _problem(text)


def test_read_message_names_all_that_is_wrong_at_once() -> None:
    problems = _problem("base_modle: m\nlora: {rank: x, alpha: y}\nlabels: {a: [1]}").splitlines()
    assert [problem.split(" ")[1] for problem in problems] == [
        "base_modle",
        "lora.rank",
        "lora.alpha",
        "labels.a",
    ]
    assert len(_problem("\n".join(f"x{index}: 1" for index in range(50))).splitlines()) == 20


def _assigned(*pairs: tuple[str, str], kind: type[Message] = FineTuningJob) -> Any:
    message = kind()
    for path, text in pairs:
        assign(message, path, text, source="--set")
    return message


def test_assign_sets_fields_by_path() -> None:
    job = _assigned(
        ("base_model", " no=1, 2 "),
        ("hyperparameters.learning_rate", "1e-4"),
        ("hyperparameters.learningRateSchedule", "cosine"),
        ("labels.team", "nlp"),
        ("labels.a.b", "null"),
        ("lora.target_modules", "[a, b]"),
        ("lora.target_modules[0]", "c"),
        ("lora.target_modules[]", "d"),
        ("lora.target_modules[3]", "e"),
        ("lora.target_modules.1", "f"),
        ("hyperparameters.batch_rows", "8"),
        ("hyperparameters.batch_tokens", "9"),
    )
    assert (job.base_model, job.hyperparameters.learning_rate) == (" no=1, 2 ", 1e-4)
    assert job.hyperparameters.learning_rate_schedule == LEARNING_RATE_SCHEDULE_COSINE
    assert dict(job.labels) == {"team": "nlp", "a.b": "null"}
    assert list(job.lora.target_modules) == ["c", "f", "d", "e"]
    assert job.hyperparameters.WhichOneof("batch_size") == "batch_tokens"


def test_assign_reaches_into_lists_of_messages_and_replaces_whole_values() -> None:
    evaluation = _assigned(
        ("arms[].arm_id", "a"),
        ("arms[0].model", "m"),
        ("arms[1].arm_id", "b"),
        ("arms[]", "{arm_id: c, num_shots: 3}"),
        ("arms[1]", '{"arm_id": "d"}'),
        ("metrics[]", "exact-match"),
        ("metrics", "[perplexity]"),
        kind=Evaluation,
    )
    assert [(arm.arm_id, arm.model, arm.num_shots) for arm in evaluation.arms] == [
        ("a", "m", 0),
        ("d", "", 0),
        ("c", "", 3),
    ]
    assert list(evaluation.metrics) == [EVALUATION_METRIC_PERPLEXITY]


def test_assign_null_unsets() -> None:
    job = _assigned(
        ("lora.rank", "4"), ("lora.alpha", "8"), ("lora.rank", "null"), ("labels.a", "b"), ("labels", "null")
    )
    assert not job.lora.HasField("rank")
    assert job.lora.alpha == 8
    assert not job.labels


def test_keys_of_maps_are_of_their_type_in_quotes_or_not() -> None:
    for text in (
        '{"by_bool_text": {"true": "a"}, "by_uint64_text": {"7": "b"}}',
        "by_bool_text: {true: a}\nby_uint64_text: {7: b}",
    ):
        message: Any = read_message(text.encode(), EveryKind, source="a.yaml").message
        assert dict(message.by_bool_text) == {True: "a"}
        assert dict(message.by_uint64_text) == {7: "b"}
    with pytest.raises(
        InvalidArgument, match=r"by_uint64_text\.-1 must be a whole number from 0 to .*, got -1"
    ):
        read_message(b'{"by_uint64_text": {"-1": "b"}}', EveryKind, source="a.json")


def test_assign_reaches_into_maps_of_messages() -> None:
    message = _assigned(
        ("by_text_inner.a.one_int32", "5"),
        ("by_text_inner.b", "{one_string: x}"),
        ("by_int32_text.-7", "y"),
        ("by_bool_text.false", "z"),
        ("one_timestamp", "2026-11-28T10:00:00Z"),
        ("one_bytes", "AP8="),
        kind=EveryKind,
    )
    assert message.by_text_inner["a"].one_int32 == 5
    assert message.by_text_inner["b"].one_string == "x"
    assert dict(message.by_int32_text) == {-7: "y"}
    assert dict(message.by_bool_text) == {False: "z"}
    assert message.one_timestamp.ToJsonString() == "2026-11-28T10:00:00Z"
    assert message.one_bytes == b"\x00\xff"


@pytest.mark.parametrize(
    ("path", "text", "problem"),
    [
        ("rank", "8", "--set: rank is no field of FineTuningJob; did you mean lora.rank?"),
        ("lora.rank", "x", "--set: lora.rank must be a whole number from -2147483648 to 2147483647, got x"),
        ("lora.rank", "", "got nothing"),
        ("lora.rnk", "8", "lora.rnk is no field of LoraConfig; did you mean rank?"),
        ("name", "x", "name cannot be set: the name is given apart"),
        ("state", "QUEUED", "state cannot be set: the service writes it"),
        ("base_model.x", "1", "base_model is a string, got .x behind it"),
        ("labels[0]", "1", "labels is a mapping, got [0] behind it"),
        ("lora[0].rank", "1", "lora is a LoraConfig, got [0].rank behind it"),
        (
            "lora.target_modules[2]",
            "a",
            "lora.target_modules has 0 elements: the next one is [0] or [], got [2]",
        ),
        ("lora.target_modules", "a", "lora.target_modules must be a list, got a"),
        ("lora.target_modules[0].x", "a", "lora.target_modules[0] has nothing below it, got x"),
        ("lora", "{rnk: 1}", "lora.rnk is no field of LoraConfig"),
        ("lora", "*a", "must be written out"),
        ("", "1", "--set: must be a path such as lora.rank or labels.team, got "),
        ("lora..rank", "1", "must be a path"),
        ("create_time.seconds", "1", "create_time cannot be set"),
    ],
)
def test_assign_refuses_with_the_path(path: str, text: str, problem: str) -> None:
    with pytest.raises(InvalidArgument) as raised:
        _assigned((path, text))
    assert problem in raised.value.message


def test_well_known_messages_are_refused_by_name() -> None:
    for path, text in (("one_timestamp", "2026-11-28"), ("one_duration", "3"), ("one_int64value", "{a: 1}")):
        with pytest.raises(
            InvalidArgument, match=rf"^--set:1: {path} must be a \w+ as proto JSON has it, got "
        ):
            _assigned((path, text), kind=EveryKind)
