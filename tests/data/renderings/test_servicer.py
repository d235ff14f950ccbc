"""Renderings over a real port, by a real worker."""

from __future__ import annotations

import json
import resource
from typing import TYPE_CHECKING, Any

import pytest
from tests.data.made_records import chat, lines, table

from luthier.errors import (
    FailedPrecondition,
    InvalidArgument,
    LuthierError,
    NotFound,
    Reason,
    Unavailable,
)
from luthier.errors.status import status_to_failure
from luthier.runtime.digests import contents_digest, files_digest
from luthier.text.tokenizer import TokenizerBundle
from luthier.v1 import data_service_pb2, dataset_pb2, rendering_pb2

if TYPE_CHECKING:
    pass

PROJECT = "projects/default"


async def test_read_rendering_gives_rows_or_lengths_and_resumes(service: Any) -> None:
    records = [chat(f"the question {number}", "the answer " * (number % 5 + 1)) for number in range(40)]
    async with service.worker():
        version = await service.version(
            lines(*records), split_settings=dataset_pb2.SplitSettings(validation_fraction=0.3)
        )
        rendering = await service.rendering(version.name)
    request = data_service_pb2.ReadRenderingRequest(name=rendering.name)
    whole = table(await service.stream("ReadRendering", request))
    assert whole.column_names == [
        "row",
        "record_id",
        "split",
        "filename",
        "line",
        "input_ids",
        "loss_mask",
        "unit",
        "role",
    ]
    assert whole["unit"].to_pylist() == whole["row"].to_pylist()
    assert set(whole["role"].to_pylist()) == {""}
    assert str(whole.schema.field("input_ids").type).startswith("list<")
    request.view = data_service_pb2.ReadRenderingRequest.VIEW_LENGTHS
    lengths = table(await service.stream("ReadRendering", request))
    assert lengths.column_names == ["row", "split", "num_tokens", "num_supervised", "unit"]
    assert lengths["num_tokens"].to_pylist() == [len(ids) for ids in whole["input_ids"].to_pylist()]
    assert lengths["num_supervised"].to_pylist() == [sum(mask) for mask in whole["loss_mask"].to_pylist()]
    request.start_row = 33
    assert table(await service.stream("ReadRendering", request)).equals(lengths.slice(33))
    request.uid = rendering.uid
    assert table(await service.stream("ReadRendering", request)).equals(lengths.slice(33))
    request.uid = "another"
    with pytest.raises(NotFound, match=f"{rendering.name} must have uid another") as caught:
        await service.stream("ReadRendering", request)
    assert caught.value.reason == Reason.RESOURCE_REPLACED
    part = data_service_pb2.ReadRenderingRequest(name=rendering.name, split=dataset_pb2.SPLIT_VALIDATION)
    assert set(table(await service.stream("ReadRendering", part))["split"].to_pylist()) == {"VALIDATION"}


async def test_preview_pages_through_rows_that_teach_nothing(service: Any) -> None:
    records = [chat(f"q{number}", "a", weight=number % 2) for number in range(8)]
    async with service.worker():
        version = await service.version(lines(*records))
        rendering = await service.rendering(version.name)
    assert [record.line for record in rendering.unsupervised_records] == [1, 3, 5, 7]
    request = data_service_pb2.PreviewRenderingRequest(
        name=rendering.name, unsupervised_only=True, page_size=3
    )
    first = await service.call("PreviewRendering", request)
    request.page_token = first.next_page_token
    second = await service.call("PreviewRendering", request)
    assert [row.row for row in [*first.rows, *second.rows]] == [0, 2, 4, 6]
    assert second.next_page_token == ""
    assert not any(token.supervised for row in first.rows for token in row.tokens)


BAD_RENDERINGS: list[tuple[dict[str, Any], str, str]] = [
    (
        {"max_tokens": 6, "length_policy": rendering_pb2.LENGTH_POLICY_FAIL},
        Reason.SEQUENCE_TOO_LONG,
        "0.jsonl:1: must have at most 6 tokens, got ",
    ),
    (
        {"chat_template": "{% for m in messages %}{{ messages|length }}{{ m.content }}{% endfor %}"},
        Reason.TEMPLATE_NOT_PREFIX_PRESERVING,
        "0.jsonl:1: the chat template is not prefix-preserving: at message 1",
    ),
    (
        {"chat_template": "{% for m in messages %}"},
        Reason.TEMPLATE_INVALID,
        "the chat template does not compile",
    ),
    (
        {"chat_template": "{{ messages[0].__class__.__mro__ }}"},
        Reason.TEMPLATE_INVALID,
        "0.jsonl:1: the chat template fails: access to attribute '__class__'",
    ),
    (
        {"chat_template": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"},
        Reason.TEMPLATE_INVALID,
        "0.jsonl:1: rendering takes more than 2 s of CPU time; pass a chat_template without",
    ),
    (
        {"chat_template": "{{ 'x' * 9999999999 }}"},
        Reason.TEMPLATE_INVALID,
        "0.jsonl:1: rendering takes more than 512 MiB of memory; pass a chat_template without",
    ),
]


async def test_a_bad_rendering_fails_with_reason_and_message(service: Any) -> None:
    async with service.worker():
        version = await service.version(lines(chat("the question", "the answer")))
        for fields, reason, message in BAD_RENDERINGS:
            rendering = await service.rendering(version.name, **fields)
            error = status_to_failure(rendering.error)
            assert rendering.state == rendering_pb2.Rendering.STATE_FAILED
            assert (error.code, error.reason) == ("INVALID_ARGUMENT", reason)
            assert error.message.startswith(message), error.message
    with pytest.raises(FailedPrecondition, match="must be READY, it is FAILED"):
        await service.call("PreviewRendering", data_service_pb2.PreviewRenderingRequest(name=rendering.name))


async def test_a_rendering_says_how_a_model_that_learns_it_is_asked(service: Any) -> None:
    own = "{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    async with service.worker():
        version = await service.version(lines(chat("the question", "the answer")))
        plain = await service.rendering(version.name)
        given = await service.rendering(version.name, chat_template=own)
    assert plain.effective_chat_template == service.models.files["chat_template.jinja"].decode()
    assert given.effective_chat_template.endswith(own)
    assert given.template_date[:4] in given.effective_chat_template
    bundle = TokenizerBundle(service.models.files)
    assert list(plain.stop_token_ids) == [bundle.token_id("<|im_end|>")]
    assert list(plain.prefix_token_ids) == []


def with_tokenizer(service: Any, **changes: Any) -> None:
    """Have the service's models use a tokenizer of other parts."""
    stored = json.loads(service.models.files["tokenizer.json"])
    changed = json.dumps({**stored, **changes}).encode()
    service.models.files = {**service.models.files, "tokenizer.json": changed}
    for model in service.models.models.values():
        model.tokenizer_digest = contents_digest(service.models.files)
        model.digest = files_digest(service.models.sha256())


# What its regular expression engine gives up on, and panics.
PANIC = {"type": "Replace", "pattern": {"Regex": "(x+x+)+y"}, "content": ""}


async def test_a_tokenizer_that_panics_is_named_with_the_record(service: Any) -> None:
    with_tokenizer(service, normalizer=PANIC)
    async with service.worker():
        version = await service.version(lines(chat("the question", "the answer"), chat("x" * 60, "a")))
        rendering = await service.rendering(version.name)
    error = status_to_failure(rendering.error)
    assert (error.code, error.reason) == ("INVALID_ARGUMENT", Reason.MODEL_INVALID)
    assert error.message.startswith("0.jsonl:2: the model's tokenizer fails: ")
    assert error.metadata == {"filename": "0.jsonl", "line": "2"}


@pytest.mark.parametrize(
    ("decoder", "said"),
    [
        (PANIC, "the model's tokenizer fails: "),
        (
            {
                "type": "Sequence",
                "decoders": [{"type": "Replace", "pattern": {"String": "x"}, "content": "x" * 400}] * 2,
            },
            "the model's tokenizer makes more than 2 MiB of text",
        ),
        (
            {
                "type": "Sequence",
                "decoders": [
                    {"type": "Replace", "pattern": {"String": "x" * 60}, "content": "y" * 20_000},
                    {"type": "Replace", "pattern": {"String": "y"}, "content": "z" * 200_000},
                ],
            },
            "the model's tokenizer takes more than 2048 MiB of memory",
        ),
    ],
)
async def test_preview_of_a_tokenizer_that_takes_too_much_is_refused_by_name(
    service: Any, decoder: dict[str, Any], said: str
) -> None:
    # One token of many x, as the decoder sees it: the byte-level alphabet writes them as they are.
    word = {"id": 399, "content": "x" * 60, "single_word": False, "lstrip": False, "rstrip": False}
    word |= {"normalized": True, "special": False}
    stored = json.loads(service.models.files["tokenizer.json"])
    with_tokenizer(service, decoder=decoder, added_tokens=[*stored["added_tokens"], word])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    async with service.worker():
        version = await service.version(lines(chat("x" * 60, "a")))
        rendering = await service.rendering(version.name)
        assert rendering.state == rendering_pb2.Rendering.STATE_READY
    request = data_service_pb2.PreviewRenderingRequest(name=rendering.name)
    with pytest.raises(FailedPrecondition) as caught:
        await service.call("PreviewRendering", request)
    assert caught.value.reason == Reason.MODEL_INVALID
    assert said in caught.value.message
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 200 << 10


async def test_a_rendering_with_another_tokenizer_than_promised_fails(service: Any) -> None:
    async with service.worker():
        version = await service.version(lines(chat("q", "a")))
        rendering = await service.rendering(version.name, f"{PROJECT}/models/other-tokenizer")
    error = status_to_failure(rendering.error)
    assert (error.code, error.reason) == ("DATA_LOSS", Reason.CHECKSUM_MISMATCH)
    assert f"must have digest {'0' * 64}" in error.message


async def test_a_rendering_by_a_model_whose_name_means_another_one_by_now_fails(service: Any) -> None:
    async with service.worker():
        version = await service.version(lines(chat("q", "a")))
    pinned = files_digest(service.models.sha256())
    wanted = rendering_pb2.Rendering(dataset_version=version.name, model=f"{PROJECT}/models/base")
    request = data_service_pb2.CreateRenderingRequest(parent=PROJECT, rendering=wanted)
    name = (await service.call("CreateRendering", request)).name
    service.models.weights_sha256 = "e" * 64
    async with service.worker():
        await service.stream("WatchRendering", data_service_pb2.WatchRenderingRequest(name=name))
    found = await service.call("GetRendering", data_service_pb2.GetRenderingRequest(name=name))
    error = status_to_failure(found.error)
    assert (error.code, error.reason) == ("DATA_LOSS", Reason.CHECKSUM_MISMATCH)
    assert f"{PROJECT}/models/base must have digest {pinned}" in error.message
    assert "was deleted and its name used again" in error.message


REFUSED_RENDERINGS: list[tuple[dict[str, Any], type[LuthierError], str, str]] = [
    ({"model": ""}, InvalidArgument, Reason.FIELD_REQUIRED, "rendering.model: must be a resource name"),
    (
        {"model": "projects/second/models/base"},
        InvalidArgument,
        Reason.CROSS_PROJECT_REFERENCE,
        "rendering.model: must be in projects/default, got 'projects/second/models/base'",
    ),
    (
        {"dataset_version": "projects/second/datasets/a/versions/b"},
        InvalidArgument,
        Reason.CROSS_PROJECT_REFERENCE,
        "rendering.dataset_version: must be in projects/default, got",
    ),
    (
        {"model": f"{PROJECT}/models/nothing"},
        NotFound,
        Reason.BASE_MODEL_MISSING,
        f"rendering.model: {PROJECT}/models/nothing does not exist",
    ),
    (
        {"model": f"{PROJECT}/models/adapter"},
        InvalidArgument,
        Reason.INVALID_FIELD,
        f"its base model is {PROJECT}/models/base",
    ),
    (
        {"model": f"{PROJECT}/models/exported"},
        InvalidArgument,
        Reason.INVALID_FIELD,
        f"must be a base model, got the export {PROJECT}/models/exported",
    ),
    (
        {"model": f"{PROJECT}/models/registering"},
        FailedPrecondition,
        Reason.WRONG_STATE,
        "must be READY, it is REGISTERING",
    ),
    (
        {"model": f"{PROJECT}/models/silent"},
        InvalidArgument,
        Reason.INVALID_FIELD,
        "rendering.max_tokens: must be set because",
    ),
    (
        {"max_tokens": 513},
        InvalidArgument,
        Reason.INVALID_FIELD,
        f"rendering.max_tokens: must be in 1..512, the context length of {PROJECT}/models/base, got 513",
    ),
    ({"max_tokens": -1}, InvalidArgument, Reason.INVALID_FIELD, "rendering.max_tokens: must be 0"),
    ({"mask_mode": 99}, InvalidArgument, Reason.INVALID_FIELD, "rendering.mask_mode: must be one of"),
    (
        {"dataset_version": f"{PROJECT}/datasets/news/versions/none"},
        NotFound,
        Reason.RESOURCE_NOT_FOUND,
        f"{PROJECT}/datasets/news/versions/none does not exist",
    ),
]


async def test_create_rendering_refuses_what_is_not_valid_and_leaves_nothing_behind(service: Any) -> None:
    async with service.worker():
        version = await service.version(lines(chat("q", "a")))
    for fields, kind, reason, message in REFUSED_RENDERINGS:
        wanted = {"dataset_version": version.name, "model": f"{PROJECT}/models/base", **fields}
        request = data_service_pb2.CreateRenderingRequest(
            parent=PROJECT, rendering=rendering_pb2.Rendering(**wanted)
        )
        with pytest.raises(kind) as caught:
            await service.call("CreateRendering", request)
        assert caught.value.reason == reason, message
        assert message in caught.value.message
    listed = await service.call("ListRenderings", data_service_pb2.ListRenderingsRequest(parent=PROJECT))
    assert list(listed.renderings) == []


async def test_create_rendering_while_models_are_away_says_so(service: Any) -> None:
    async with service.worker():
        version = await service.version(lines(chat("q", "a")))
    await service.models_stack.aclose()
    request = data_service_pb2.CreateRenderingRequest(
        parent=PROJECT,
        rendering=rendering_pb2.Rendering(dataset_version=version.name, model=f"{PROJECT}/models/base"),
    )
    with pytest.raises(Unavailable, match="the Training service must answer, it is away"):
        await service.call("CreateRendering", request)


async def test_etags_of_versions_and_renderings_count_states_and_no_progress(service: Any) -> None:
    async with service.worker():
        version = await service.version(lines(chat("q", "a")))
        rendering = await service.rendering(version.name)
        for name, watch, request in (
            (version.name, "WatchDatasetVersion", data_service_pb2.WatchDatasetVersionRequest),
            (rendering.name, "WatchRendering", data_service_pb2.WatchRenderingRequest),
        ):
            events = await service.stream(watch, request(name=name))
            kinds = [event.WhichOneof("payload") for event in events]
            assert kinds.count("progress") >= 1
            # Made, begun, done.
            assert kinds.count("state_change") == 3
    assert (version.etag, rendering.etag) == ('"3"', '"3"')
