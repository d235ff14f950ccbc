"""Aliases over a real server: created, moved all at once, kept in a history, refused by their gates."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sqlalchemy import select
from tests.stores import service_database

from luthier.errors import (
    Aborted,
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Reason,
)
from luthier.v1 import evaluation_service_pb2 as api
from luthier.v1.model_alias_pb2 import AliasMove, Gate, ModelAlias, ScoreGate
from luthier.work.schema import held_elsewhere


async def created(site: Any, *gates: Gate, alias_id: str = "production", **fields: Any) -> ModelAlias:
    request = api.CreateModelAliasRequest(
        parent=site.PARENT, model_alias=ModelAlias(gates=gates, **fields), model_alias_id=alias_id
    )
    made: ModelAlias = await site.call("CreateModelAlias", request)
    return made


async def moved(site: Any, model: str, *, alias_id: str = "production", **fields: Any) -> ModelAlias:
    request = api.MoveModelAliasRequest(
        name=f"{site.PARENT}/modelAliases/{alias_id}", model=f"{site.PARENT}/models/{model}", **fields
    )
    found: ModelAlias = await site.call("MoveModelAlias", request)
    return found


async def held(site: Any) -> list[tuple[str, bool]]:
    """What the service holds elsewhere, and whether it lets go of it."""
    database = service_database(site.home, "evaluation")
    rows = await database.rows(select(held_elsewhere.c.name, held_elsewhere.c.released))
    await database.close()
    return sorted((row["name"].rpartition("/")[2], bool(row["released"])) for row in rows)


async def history(site: Any, **page: Any) -> list[AliasMove]:
    request = api.ListModelAliasMovesRequest(parent=f"{site.PARENT}/modelAliases/production", **page)
    return list((await site.call("ListModelAliasMoves", request)).moves)


async def test_an_alias_moves_from_model_to_model_and_keeps_its_history(site: Any) -> None:
    made = await created(site, labels={"team": "a"})
    assert (made.name, made.etag) == (f"{site.PARENT}/modelAliases/production", '"1"')
    assert not made.HasField("current")
    first = await moved(site, "tuned", etag=made.etag)
    assert first.current.model == f"{site.PARENT}/models/tuned"
    assert first.etag != made.etag
    assert await held(site) == [("tuned", False)]
    second = await moved(site, "tuned-more")
    assert await held(site) == [("tuned", True), ("tuned-more", False)]
    moves = await history(site)
    assert [(one.number, one.model.rpartition("/")[2]) for one in moves] == [(1, "tuned"), (2, "tuned-more")]
    assert moves == [first.current, second.current]
    assert [one.number for one in await history(site, page_size=1)] == [1]
    get = api.GetModelAliasRequest(name=made.name)
    assert await site.call("GetModelAlias", get) == second
    listed = await site.call(
        "ListModelAliases", api.ListModelAliasesRequest(parent=site.PARENT, filter='labels.team = "a"')
    )
    assert list(listed.model_aliases) == [second]


async def test_of_moves_at_the_same_time_one_counts_and_the_others_are_told(site: Any) -> None:
    await created(site)
    names = ["tuned", "tuned-more", "base", "other"]
    found = await asyncio.gather(*(moved(site, name) for name in names), return_exceptions=True)
    done = [one for one in found if isinstance(one, ModelAlias)]
    assert done
    assert all(isinstance(one, ModelAlias | Aborted) for one in found)
    moves = await history(site)
    assert [one.number for one in moves] == list(range(1, len(done) + 1))
    assert {one.model for one in moves} == {one.current.model for one in done}


async def test_a_gate_stays_shut_until_an_evaluation_of_the_model_opens_it(site: Any) -> None:
    await created(site, Gate(score=ScoreGate(score="exact_match", least=0.5)), alias_id="strict")
    await created(site, Gate(score=ScoreGate(score="exact_match", least=0.0)), alias_id="mild")
    await created(site, Gate(score=ScoreGate(score="chrf", least=0.1)), alias_id="unmeasured")
    with pytest.raises(InvalidArgument, match="must name an evaluation"):
        await moved(site, "tuned", alias_id="strict")
    async with site.worker():
        made = await site.evaluate(arms=[("zero", "base", 0), ("tuned", "tuned", 0)], max_new_tokens=4)
        done = await site.ended(made.name)
    refused: dict[str, tuple[str, Reason]] = {
        "strict": ("tuned", Reason.ALIAS_BLOCKED),
        "unmeasured": ("tuned", Reason.METRIC_NOT_MEASURED),
        "mild": ("tuned-more", Reason.WRONG_STATE),
    }
    for alias_id, (model, reason) in refused.items():
        with pytest.raises(FailedPrecondition) as caught:
            await moved(site, model, alias_id=alias_id, evaluation=done.name)
        assert caught.value.reason == reason, alias_id
    alias = await moved(site, "tuned", alias_id="mild", evaluation=done.name)
    assert alias.current.evaluation_uid == done.uid
    assert alias.current.gates[0].open
    for alias_id in ("strict", "unmeasured"):
        found = await site.call(
            "GetModelAlias", api.GetModelAliasRequest(name=f"{site.PARENT}/modelAliases/{alias_id}")
        )
        assert not found.HasField("current")


async def test_what_cannot_be_is_refused_by_name(site: Any) -> None:
    await created(site)
    with pytest.raises(AlreadyExists):
        await created(site)
    with pytest.raises(InvalidArgument, match=r"model_alias\.gates\[0\]\.score\.score"):
        await created(site, Gate(score=ScoreGate(score="meteor", least=1)), alias_id="other")
    with pytest.raises(NotFound, match="models/none does not exist"):
        await moved(site, "none")
    with pytest.raises(NotFound, match="evaluations/none does not exist"):
        await moved(site, "tuned", evaluation=f"{site.PARENT}/evaluations/none")
    with pytest.raises(Aborted):
        await moved(site, "tuned", etag='"9"')
    elsewhere = api.MoveModelAliasRequest(
        name=f"{site.PARENT}/modelAliases/production", model="projects/another/models/tuned"
    )
    with pytest.raises(InvalidArgument, match="must be in projects/default"):
        await site.call("MoveModelAlias", elsewhere)
    ask = api.GenerateTextRequest(model=f"{site.PARENT}/modelAliases/production", prompt="a")
    with pytest.raises(FailedPrecondition, match="stands for no model yet"):
        await anext(site.stream("GenerateText", ask))


async def test_a_deleted_alias_lets_go_of_its_model_and_its_name(site: Any) -> None:
    made = await created(site)
    await moved(site, "tuned")
    gone = await site.call("DeleteModelAlias", api.DeleteModelAliasRequest(name=made.name))
    assert gone.HasField("delete_time")
    assert await held(site) == [("tuned", True)]
    again = await created(site)
    assert again.uid != made.uid
    assert not await history(site)


async def test_whoever_asks_an_alias_asks_its_model(site: Any) -> None:
    await created(site)
    async with site.worker():
        texts = {}
        for name in ("tuned", "tuned-more"):
            texts[name] = await site.said(name, "what colour has thing 1?", max_new_tokens=8)
            await moved(site, name)
            request = api.GenerateTextRequest(
                model=f"{site.PARENT}/modelAliases/production",
                prompt="what colour has thing 1?",
                max_new_tokens=8,
            )
            said = "".join([piece.text async for piece in site.stream("GenerateText", request)])
            assert said == texts[name]
    assert texts["tuned"] != texts["tuned-more"]
