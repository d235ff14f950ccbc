"""The standard methods of any family: what is declared does as every other family."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.work.things import NAME, PARENT, State, Things, things_in
from tests.work.watching import messages

from luthier.errors import InvalidArgument, NotFound, Reason
from luthier.runtime.names import Pattern
from luthier.runtime.paging import PageTokens
from luthier.runtime.server import of_families
from luthier.v1 import evaluation_service_pb2 as api
from luthier.v1.training_service_pb2 import (
    ListFineTuningJobEventsRequest,
    ListFineTuningJobEventsResponse,
)
from luthier.work.standard_methods import StandardMethods

TOKENS = PageTokens(b"0123456789abcdef")
PATTERN = Pattern("projects/{project}/evaluations/{evaluation}")
CONTEXT: Any = None


class ThingsServicer:
    """A family with nothing of its own but its declaration."""

    def __init__(self, things: Things) -> None:
        family = things.family
        standard = StandardMethods(pattern=PATTERN, tokens=TOKENS)
        self.GetEvaluation = standard.get(family.message)
        self.ListEvaluations = standard.list(
            family.page,
            lambda found, token: api.ListEvaluationsResponse(evaluations=found, next_page_token=token),
        )
        self.CancelEvaluation = standard.cancel(family.cancel)
        self.DeleteEvaluation = standard.delete(family.delete)
        self.UndeleteEvaluation = standard.undelete(family.undeleting)
        self.PurgeEvaluation = standard.purge(family.undeleting)
        self.WatchEvaluation = standard.watch(family.watch)
        self.ListEvents = standard.events(
            family,
            lambda found, token: ListFineTuningJobEventsResponse(events=found, next_page_token=token),
        )


@pytest.fixture
async def things(tmp_path: Path) -> AsyncIterator[Things]:
    async with things_in(tmp_path) as made:
        yield made


@pytest.fixture
def servicer(things: Things) -> ThingsServicer:
    return ThingsServicer(things)


@asynccontextmanager
async def watched(servicer: ThingsServicer, request: api.WatchEvaluationRequest) -> AsyncIterator[Any]:
    events = messages(servicer.WatchEvaluation(request, CONTEXT))
    try:
        yield events
    finally:
        await events.aclose()


async def test_a_declared_family_is_read_listed_stopped_and_deleted(
    things: Things, servicer: ThingsServicer
) -> None:
    for number in range(3):
        await things.add(f"{PARENT}/evaluations/e{number}", queued=False)
    read = await servicer.GetEvaluation(api.GetEvaluationRequest(name=f"{PARENT}/evaluations/e1"), CONTEXT)
    assert read.name == f"{PARENT}/evaluations/e1"
    listing = api.ListEvaluationsRequest(parent=PARENT, page_size=2)
    first = await servicer.ListEvaluations(listing, CONTEXT)
    listing.page_token = first.next_page_token
    rest = await servicer.ListEvaluations(listing, CONTEXT)
    assert [one.name[-2:] for page in (first, rest) for one in page.evaluations] == ["e2", "e1", "e0"]
    await things.add()
    stopped = await servicer.CancelEvaluation(api.CancelEvaluationRequest(name=NAME), CONTEXT)
    assert stopped.state == State.STATE_CANCELLED
    delete = api.DeleteEvaluationRequest(name=NAME, etag=stopped.etag)
    deleted = await servicer.DeleteEvaluation(delete, CONTEXT)
    assert deleted.HasField("delete_time")
    with pytest.raises(NotFound):
        await servicer.GetEvaluation(api.GetEvaluationRequest(name=NAME), CONTEXT)
    undelete = api.UndeleteEvaluationRequest(name=NAME, uid=deleted.uid, etag=deleted.etag)
    assert (await servicer.UndeleteEvaluation(undelete, CONTEXT)).uid == deleted.uid
    await servicer.DeleteEvaluation(api.DeleteEvaluationRequest(name=NAME), CONTEXT)
    await servicer.PurgeEvaluation(api.PurgeEvaluationRequest(name=NAME, uid=deleted.uid), CONTEXT)
    with pytest.raises(NotFound):
        await servicer.UndeleteEvaluation(api.UndeleteEvaluationRequest(name=NAME), CONTEXT)


async def test_a_page_of_great_resources_holds_fewer(things: Things, servicer: ThingsServicer) -> None:
    for number in range(4):
        arms = [{"arm_id": "a", "chat_template": "x" * 900_000}]
        await things.add(f"{PARENT}/evaluations/e{number}", queued=False, arms=arms)
    page = await servicer.ListEvaluations(api.ListEvaluationsRequest(parent=PARENT), CONTEXT)
    assert len(page.evaluations) == 2
    assert page.next_page_token


async def test_names_and_parents_of_others_are_refused(servicer: ThingsServicer) -> None:
    for name in ("projects/p/models/m", "projects/-/evaluations/a"):
        with pytest.raises(InvalidArgument):
            await servicer.GetEvaluation(api.GetEvaluationRequest(name=name), CONTEXT)
        with pytest.raises(InvalidArgument):
            await servicer.CancelEvaluation(api.CancelEvaluationRequest(name=name), CONTEXT)
        with pytest.raises(InvalidArgument):
            await servicer.DeleteEvaluation(api.DeleteEvaluationRequest(name=name), CONTEXT)
        with pytest.raises(InvalidArgument):
            await servicer.UndeleteEvaluation(api.UndeleteEvaluationRequest(name=name), CONTEXT)
        with pytest.raises(InvalidArgument):
            await servicer.ListEvents(ListFineTuningJobEventsRequest(parent=name), CONTEXT)
        async with watched(servicer, api.WatchEvaluationRequest(name=name)) as events:
            with pytest.raises(InvalidArgument):
                await anext(events)
    for parent in ("projects/p/models/m", "projects/-"):
        with pytest.raises(InvalidArgument, match="parent: must be"):
            await servicer.ListEvaluations(api.ListEvaluationsRequest(parent=parent), CONTEXT)


async def test_a_watch_does_not_go_on_in_another_resource_of_the_name(
    things: Things, servicer: ThingsServicer
) -> None:
    old = await things.add()
    request = api.WatchEvaluationRequest(name=NAME, uid=old.uid)
    async with watched(servicer, request) as events:
        assert (await anext(events)).sequence == 1
    await things.cancel()
    await things.family.delete(NAME, "")
    request.start_sequence = 2
    async with watched(servicer, request) as events:
        with pytest.raises(NotFound, match=f"{NAME} does not exist"):
            await anext(events)
    new = await things.add()
    await things.cancel()
    async with watched(servicer, request) as events:
        with pytest.raises(NotFound, match=f"{NAME} must have uid {old.uid}, .* it has {new.uid}") as caught:
            await anext(events)
    assert caught.value.reason == Reason.RESOURCE_REPLACED
    request.uid = ""
    async with watched(servicer, request) as events:
        assert [event.state_change.state async for event in events] == ["CANCELLED"], (
            "unset: as it was before"
        )


async def test_a_watch_from_below_nothing_is_refused(things: Things, servicer: ThingsServicer) -> None:
    await things.add()
    async with watched(servicer, api.WatchEvaluationRequest(name=NAME, start_sequence=-1)) as events:
        with pytest.raises(InvalidArgument, match=r"start_sequence: must be 0 or more, got -1"):
            await anext(events)


async def test_events_are_paged(things: Things, servicer: ThingsServicer) -> None:
    await things.move(
        await things.move(await things.add(queued=False), State.STATE_RUNNING), State.STATE_FAILED
    )
    request = ListFineTuningJobEventsRequest(parent=NAME, page_size=2)
    first = await servicer.ListEvents(request, CONTEXT)
    request.page_token = first.next_page_token
    rest = await servicer.ListEvents(request, CONTEXT)
    assert [[event.sequence for event in page.events] for page in (first, rest)] == [[1, 2], [3]]
    assert not rest.next_page_token


def test_a_service_with_a_method_that_no_family_declares_is_not_served(servicer: ThingsServicer) -> None:
    service = api.DESCRIPTOR.services_by_name["EvaluationService"]

    def add(made: Any, server: Any) -> None:
        raise AssertionError("it is not added")

    with pytest.raises(AssertionError, match="CreateEvaluation must be of one family, it is of 0"):
        of_families(service, add, (servicer,))
    twice = SimpleNamespace(**{method.name: None for method in service.methods})
    with pytest.raises(AssertionError, match="GetEvaluation must be of one family, it is of 2"):
        of_families(service, add, (servicer, twice))
