"""EvaluationService over a real server: every call, its pages, its refusals with code and reason."""

from __future__ import annotations

from typing import Any

import pytest
from tests.stores import service_database

from luthier.errors import (
    Aborted,
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    LuthierError,
    NotFound,
    OutOfRange,
    PermissionDenied,
    Reason,
    Unauthenticated,
    Unavailable,
)
from luthier.evaluation.evaluations.repository import evaluations
from luthier.text.records import ChatRecord, Message
from luthier.v1 import chat_pb2, dataset_pb2, evaluation_pb2, evaluation_service_pb2, model_pb2

QUEUED, CANCELLED, SUCCEEDED = (
    evaluation_pb2.Evaluation.STATE_QUEUED,
    evaluation_pb2.Evaluation.STATE_CANCELLED,
    evaluation_pb2.Evaluation.STATE_SUCCEEDED,
)
REQUEST_ID = "7d3b2d4e-8f3a-4d52-9f3c-0d9a3f1b2c4d"


def creation(site: Any, **changes: Any) -> evaluation_service_pb2.CreateEvaluationRequest:
    """A request to create an evaluation of the base model; `changes` are fields of the evaluation."""
    arm = evaluation_pb2.EvaluationArm(arm_id="zero", model=f"{site.PARENT}/models/base")
    wanted = evaluation_pb2.Evaluation(**{"dataset_version": site.VERSION, "arms": [arm], **changes})
    return evaluation_service_pb2.CreateEvaluationRequest(parent=site.PARENT, evaluation=wanted)


def arm(site: Any, arm_id: str, model: str) -> evaluation_pb2.EvaluationArm:
    return evaluation_pb2.EvaluationArm(arm_id=arm_id, model=f"{site.PARENT}/models/{model}")


def listing(site: Any, **fields: Any) -> evaluation_service_pb2.ListEvaluationsRequest:
    return evaluation_service_pb2.ListEvaluationsRequest(parent=site.PARENT, **fields)


async def test_create_returns_the_queued_evaluation_with_what_it_pinned(site: Any) -> None:
    wanted = creation(site, arms=[arm(site, "tuned", "tuned")], labels={"team": "a"}, display_name="First")
    wanted.evaluation_id = "first"
    made = await site.call("CreateEvaluation", wanted)
    assert (made.name, made.state, made.etag) == (f"{site.PARENT}/evaluations/first", QUEUED, '"1"')
    assert (made.split, made.max_new_tokens) == (dataset_pb2.SPLIT_TEST, 256)
    assert list(made.metrics) == [
        evaluation_pb2.EVALUATION_METRIC_EXACT_MATCH,
        evaluation_pb2.EVALUATION_METRIC_PERPLEXITY,
    ]
    assert made.dataset_digest == "d" * 64
    assert set(made.model_digests) == {f"{site.PARENT}/models/{name}" for name in ("base", "tuned")}
    assert await site.get(made.name) == made
    with pytest.raises(AlreadyExists) as caught:
        await site.call("CreateEvaluation", wanted)
    assert caught.value.reason == Reason.RESOURCE_EXISTS


async def test_create_names_every_field_that_is_wrong(site: Any) -> None:
    wanted = creation(site, max_records=-1, max_new_tokens=9000, arms=[])
    with pytest.raises(InvalidArgument) as caught:
        await site.call("CreateEvaluation", wanted)
    assert caught.value.message.split("; ") == [
        "evaluation.arms: must hold 1 to 16 arms, got 0",
        "evaluation.max_records: must not be negative, got -1",
        "evaluation.max_new_tokens: must be in 1..8192, got 9000",
    ]


REFUSED: tuple[tuple[dict[str, Any], type[LuthierError], Reason, str], ...] = (
    ({"metrics": [0]}, InvalidArgument, Reason.INVALID_FIELD, "BLEU, ..., got number 0"),
    ({"metrics": [77]}, InvalidArgument, Reason.INVALID_FIELD, "BLEU, ..., got number 77"),
    ({"split": 77}, InvalidArgument, Reason.INVALID_FIELD, "TEST, got number 77"),
    (
        {"dataset_version": "projects/other/datasets/d/versions/v"},
        InvalidArgument,
        Reason.CROSS_PROJECT_REFERENCE,
        "must be in projects/default",
    ),
    (
        {"dataset_version": "projects/default/datasets/d/versions/none"},
        NotFound,
        Reason.RESOURCE_NOT_FOUND,
        "does not exist",
    ),
    ({"split": 2}, FailedPrecondition, Reason.WRONG_STATE, "no record in the VALIDATION split"),
)


async def test_create_refuses_and_leaves_nothing(site: Any) -> None:
    for changes, kind, reason, said in REFUSED:
        with pytest.raises(kind, match=said) as caught:
            await site.call("CreateEvaluation", creation(site, **changes))
        assert caught.value.reason == reason
    assert list((await site.call("ListEvaluations", listing(site))).evaluations) == []


async def test_arms_of_two_bases_have_each_its_own_and_all_are_referred_to(site: Any) -> None:
    arms = [arm(site, "a", "tuned"), arm(site, "b", "other")]
    made = await site.call("CreateEvaluation", creation(site, arms=arms))
    assert [one.base_model.rsplit("/", 1)[-1] for one in made.arms] == ["base", "other"]
    references = {one.name.rsplit("/", 1)[-1]: one.uid for one in made.references}
    assert references.keys() == {"v1", "tuned", "other", "base"}
    assert all(references.values())


async def test_a_model_that_is_not_ready_is_refused(site: Any) -> None:
    site.models.states["base"] = model_pb2.Model.STATE_REGISTERING
    with pytest.raises(FailedPrecondition, match="must be READY, it is REGISTERING") as caught:
        await site.call("CreateEvaluation", creation(site))
    assert caught.value.reason == Reason.WRONG_STATE


async def test_a_request_id_makes_one_evaluation(site: Any) -> None:
    wanted = creation(site)
    wanted.request_id = REQUEST_ID
    first = await site.call("CreateEvaluation", wanted)
    assert await site.call("CreateEvaluation", wanted) == first
    wanted.evaluation.seed = 1
    with pytest.raises(InvalidArgument) as caught:
        await site.call("CreateEvaluation", wanted)
    assert caught.value.reason == Reason.REQUEST_ID_REUSED


async def test_list_pages_filters_and_orders(site: Any) -> None:
    names = [(await site.evaluate(labels={"half": str(number % 2)})).name for number in range(5)]
    pages: list[list[str]] = []
    token = ""
    while not pages or token:
        page = await site.call("ListEvaluations", listing(site, page_size=2, page_token=token))
        pages.append([one.name for one in page.evaluations])
        token = page.next_page_token
    assert pages == [names[:2:-1], names[2:0:-1], names[:1]]
    oldest = await site.call("ListEvaluations", listing(site, order_by="create_time"))
    assert [one.name for one in oldest.evaluations] == names
    odd = await site.call("ListEvaluations", listing(site, filter='labels.half = "1" AND state = "QUEUED"'))
    assert [one.name for one in odd.evaluations] == [names[3], names[1]]
    for fields, reason in (
        ({"page_token": "x"}, Reason.PAGE_TOKEN_INVALID),
        ({"filter": "size > 3"}, Reason.FILTER_INVALID),
        ({"order_by": "name"}, Reason.ORDER_BY_INVALID),
    ):
        with pytest.raises(InvalidArgument) as caught:
            await site.call("ListEvaluations", listing(site, **fields))
        assert caught.value.reason == reason


async def test_a_page_of_great_evaluations_fits_a_message_of_any_client(site: Any) -> None:
    names = [(await site.evaluate()).name for _ in range(5)]
    database = service_database(site.home, "evaluation")
    async with database.transaction() as connection:
        for name in names:
            found = await evaluations().get(connection, name)
            changed = found.copy()
            changed.warnings.append("x" * 900_000)
            await evaluations().update(connection, found, changed)
    await database.close()
    pages: list[list[str]] = []
    token = ""
    while not pages or token:
        page = await site.call("ListEvaluations", listing(site, page_size=100, page_token=token))
        pages.append([one.name for one in page.evaluations])
        token = page.next_page_token
    assert pages == [names[:2:-1], names[2:0:-1], names[:1]]


async def test_cancel_takes_the_etag_and_repeats_without_harm(site: Any) -> None:
    made = await site.evaluate()
    cancel = evaluation_service_pb2.CancelEvaluationRequest(name=made.name, etag='"7"')
    with pytest.raises(Aborted) as caught:
        await site.call("CancelEvaluation", cancel)
    assert caught.value.reason == Reason.ETAG_MISMATCH
    cancel.etag = made.etag
    cancelled = await site.call("CancelEvaluation", cancel)
    assert cancelled.state == CANCELLED
    cancel.etag = ""
    assert await site.call("CancelEvaluation", cancel) == cancelled


async def test_watch_tells_the_whole_life_and_ends(site: Any) -> None:
    made = await site.evaluate()
    await site.call("CancelEvaluation", evaluation_service_pb2.CancelEvaluationRequest(name=made.name))
    watch = evaluation_service_pb2.WatchEvaluationRequest(name=made.name)
    events = [event async for event in site.stream("WatchEvaluation", watch)]
    assert [event.state_change.state for event in events] == ["QUEUED", "CANCELLING", "CANCELLED"]
    watch.start_sequence = 3
    assert [event async for event in site.stream("WatchEvaluation", watch)] == events[2:]
    watch.start_sequence = 9
    with pytest.raises(OutOfRange):
        await anext(site.stream("WatchEvaluation", watch))


async def test_an_unknown_evaluation_is_not_found_by_any_call(site: Any) -> None:
    name = f"{site.PARENT}/evaluations/none"
    requests = {
        "GetEvaluation": evaluation_service_pb2.GetEvaluationRequest(name=name),
        "CancelEvaluation": evaluation_service_pb2.CancelEvaluationRequest(name=name),
        "ListPredictions": evaluation_service_pb2.ListPredictionsRequest(parent=name),
    }
    for method, request in requests.items():
        with pytest.raises(NotFound) as caught:
            await site.call(method, request)
        assert caught.value.reason == Reason.RESOURCE_NOT_FOUND
    with pytest.raises(NotFound):
        await anext(site.stream("WatchEvaluation", evaluation_service_pb2.WatchEvaluationRequest(name=name)))


async def test_keys_are_checked_and_a_workers_key_is_not_enough(site: Any) -> None:
    with pytest.raises(Unauthenticated) as caught:
        await site.call("CreateEvaluation", creation(site), key="wrong")
    assert caught.value.reason == Reason.CREDENTIALS_INVALID
    with pytest.raises(PermissionDenied):
        await site.call("CreateEvaluation", creation(site), key=site.keys.worker_key)


async def test_predictions_come_in_pages_of_rows(site: Any) -> None:
    async with site.worker():
        made = await site.evaluate(max_records=5, max_new_tokens=2)
        with pytest.raises(FailedPrecondition, match="must be SUCCEEDED to have predictions"):
            await site.predictions((await site.evaluate()).name)
        assert (await site.ended(made.name)).state == SUCCEEDED
    assert await pages_of(site, made.name, page_size=2) == [[0, 1], [2, 3], [4]]
    assert await pages_of(site, made.name, page_size=0) == [[0, 1, 2, 3, 4]]
    with pytest.raises(InvalidArgument):
        await site.call(
            "ListPredictions", evaluation_service_pb2.ListPredictionsRequest(parent=made.name, page_token="x")
        )


async def test_a_token_of_a_deleted_evaluation_is_refused_for_the_new_one_of_its_name(site: Any) -> None:
    wanted = creation(site, max_records=3, max_new_tokens=2)
    wanted.evaluation_id = "again"
    async with site.worker():
        made = await site.call("CreateEvaluation", wanted)
        assert (await site.ended(made.name)).state == SUCCEEDED
        request = evaluation_service_pb2.ListPredictionsRequest(parent=made.name, page_size=1)
        request.page_token = (await site.call("ListPredictions", request)).next_page_token
        assert [one.row for one in (await site.call("ListPredictions", request)).predictions] == [1]
        deletion = evaluation_service_pb2.DeleteEvaluationRequest(name=made.name)
        await site.call("DeleteEvaluation", deletion)
        await site.call("CreateEvaluation", wanted)
        assert (await site.ended(made.name)).state == SUCCEEDED
    with pytest.raises(InvalidArgument) as caught:
        await site.call("ListPredictions", request)
    assert caught.value.reason == Reason.PAGE_TOKEN_INVALID


async def test_a_page_of_long_predictions_fits_a_message_of_any_client(site: Any) -> None:
    long = "very " * 180_000
    site.data.records["TEST"] = [
        ChatRecord(
            messages=(Message(role="user", content="q"), Message(role="assistant", content=f"{row} {long}"))
        )
        for row in range(5)
    ]
    async with site.worker():
        made = await site.evaluate(max_new_tokens=2)
        assert (await site.ended(made.name)).state == SUCCEEDED
    # 0.9 MB each, of which two fit; the channel takes 4 MiB, as any does that nobody set up.
    assert await pages_of(site, made.name, page_size=1000) == [[0, 1], [2, 3], [4]]


async def pages_of(site: Any, name: str, page_size: int) -> list[list[int]]:
    """Row numbers of an evaluation's predictions, page by page."""
    request = evaluation_service_pb2.ListPredictionsRequest(parent=name, page_size=page_size)
    pages: list[list[int]] = []
    while not pages or request.page_token:
        page = await site.call("ListPredictions", request)
        pages.append([one.row for one in page.predictions])
        request.page_token = page.next_page_token
    return pages


NOT_ANSWERED: tuple[tuple[dict[str, Any], type[LuthierError], Reason], ...] = (
    ({"model": "m", "prompt": "x"}, InvalidArgument, Reason.INVALID_FIELD),
    ({"model": "projects/default/models/none", "prompt": "x"}, NotFound, Reason.RESOURCE_NOT_FOUND),
    ({"model": "projects/default/models/base"}, InvalidArgument, Reason.FIELD_REQUIRED),
    ({"model": "projects/default/models/base", "prompt": "x"}, Unavailable, Reason.NO_WORKER),
    (
        {
            "model": "projects/default/models/base",
            "conversation": chat_pb2.Conversation(messages=[chat_pb2.ChatMessage(role="assistant")]),
        },
        InvalidArgument,
        Reason.INVALID_FIELD,
    ),
)


async def test_generation_refuses(site: Any) -> None:
    for fields, kind, reason in NOT_ANSWERED:
        with pytest.raises(kind) as caught:
            await anext(site.stream("GenerateText", evaluation_service_pb2.GenerateTextRequest(**fields)))
        assert caught.value.reason == reason
