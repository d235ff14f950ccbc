"""Adapters of a base model in memory: they come when they are asked for, and go when others need their room."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from tests.evaluation.here import Here
from tests.evaluation.tiny_models import write_adapter
from tests.evaluation.worker.conftest import Bench

from luthier.errors import Cancelled, NotFound
from luthier.evaluation.worker.engine import EngineClient
from luthier.evaluation.worker.loaded_model import MAX_ADAPTERS, LoadedModel
from luthier.evaluation.worker.models import Models
from luthier.evaluation.worker.order import LoadOrder
from luthier.lm.generate import GenerationRequest
from luthier.work.limited import Check


def used_once(bench: Bench, models: Models, loaded: LoadedModel, number: int) -> str:
    with bench.adapter(models, loaded, number) as name:
        return name


async def test_adapters_beyond_the_limit_go_longest_unused_first_and_none_in_use(bench: Bench) -> None:
    def use() -> None:
        with closing(bench.models()) as models, models.base(bench.reference("base"), bench.token) as loaded:
            with bench.adapter(models, loaded, 0) as held:
                names = [used_once(bench, models, loaded, number) for number in range(1, MAX_ADAPTERS + 3)]
                present = [name for name in names if has_adapter(loaded, name)]
                assert present == names[-(MAX_ADAPTERS - 1) :]
                assert has_adapter(loaded, held)
            with bench.adapter(models, loaded, MAX_ADAPTERS + 3):
                assert not has_adapter(loaded, names[-MAX_ADAPTERS + 1])
                assert has_adapter(loaded, names[-1])

    await asyncio.to_thread(use)


async def test_an_adapter_whose_asker_went_while_it_left_comes_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def use() -> None:
        with closing(bench.models()) as models, models.base(bench.reference("base"), bench.token) as loaded:
            first, *_ = [used_once(bench, models, loaded, number) for number in range(MAX_ADAPTERS)]
            remove = loaded.engine.remove_adapter

            def leaving(name: str, check: Check = lambda: None) -> None:
                remove(name, check)
                raise Cancelled("nobody listens")

            with monkeypatch.context() as patch:
                patch.setattr(loaded.engine, "remove_adapter", leaving)
                with pytest.raises(Cancelled):
                    used_once(bench, models, loaded, MAX_ADAPTERS)
            assert not has_adapter(loaded, first)
            with bench.adapter(models, loaded, 0) as name:
                assert (name, has_adapter(loaded, name)) == (first, True)

    await asyncio.to_thread(use)


@pytest.mark.parametrize("begun", [True, False])
async def test_an_adapter_whose_asker_went_while_it_came_is_one_of_those_that_leave(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, *, begun: bool
) -> None:
    def use() -> None:
        with closing(bench.models()) as models, models.base(bench.reference("base"), bench.token) as loaded:
            load = loaded.engine.load_adapter
            asked: list[str] = []

            def leaving(folder: Path, name: str, check: Check = lambda: None) -> None:
                asked.append(name)
                if begun:
                    load(folder, name, check)
                raise Cancelled("nobody listens")

            with monkeypatch.context() as patch:
                patch.setattr(loaded.engine, "load_adapter", leaving)
                with pytest.raises(Cancelled):
                    used_once(bench, models, loaded, 0)
                with pytest.raises(Cancelled):
                    used_once(bench, models, loaded, 1)
            assert [has_adapter(loaded, name) for name in asked] == [begun, begun]
            with bench.adapter(models, loaded, 0) as name:
                assert has_adapter(loaded, name)
            others = [used_once(bench, models, loaded, number) for number in range(2, MAX_ADAPTERS + 1)]
            present = [one for one in (*asked, *others) if has_adapter(loaded, one)]
            assert present == [asked[0], *others], "what may not be there goes first"

    await asyncio.to_thread(use)


async def test_many_threads_may_want_one_adapter_at_once(bench: Bench) -> None:
    barrier = threading.Barrier(8)

    def use() -> None:
        with closing(bench.models()) as models, models.base(bench.reference("base"), bench.token) as loaded:

            def want(_: int) -> str:
                barrier.wait(10)
                with bench.adapter(models, loaded, 1) as name:
                    assert has_adapter(loaded, name)
                    return name

            with ThreadPoolExecutor(8) as threads:
                assert len(set(threads.map(want, range(8)))) == 1

    await asyncio.to_thread(use)


async def test_no_adapter_is_the_base_itself(bench: Bench) -> None:
    def use() -> None:
        with (
            closing(bench.models()) as models,
            models.base(bench.reference("base"), bench.token) as loaded,
            models.adapter(loaded, None, bench.token) as name,
        ):
            assert name is None

    await asyncio.to_thread(use)


def has_adapter(loaded: LoadedModel, name: str) -> bool:
    request = GenerationRequest(request_id="r", prompts=((5,),), max_new_tokens=1, adapter=name)
    (refusal,) = loaded.engine.unfit([request])
    assert refusal is None or isinstance(refusal, NotFound)
    return refusal is None


def answered(engine: EngineClient, adapter: str | None) -> list[int]:
    request = GenerationRequest(
        request_id=str(adapter), prompts=((5, 9, 11),), max_new_tokens=12, adapter=adapter
    )
    return [token for event in engine.generate(request) for token in event.token_ids]


async def test_an_adapter_with_an_embedding_of_its_own_is_asked_beside_others(bench: Bench) -> None:
    def use() -> None:
        folders = bench.site.models.folders
        folders["whole"] = bench.site.home / "whole"
        write_adapter(folders["base"], folders["whole"], 3, ("embed_tokens",))
        wanted = []
        for key in ("whole", "tuned", None):
            place = Here(LoadOrder(folder=folders["base"]))
            place.begun()
            alone = EngineClient(place)
            if key is not None:
                alone.load_adapter(folders[key], "alone")
            wanted.append(answered(alone, key and "alone"))
            alone.close()
        assert len(set(map(tuple, wanted))) == 3
        with (
            closing(bench.models()) as models,
            models.base(bench.reference("base"), bench.token) as loaded,
            models.adapter(loaded, bench.reference("whole"), bench.token) as whole,
            models.adapter(loaded, bench.reference("tuned"), bench.token) as tuned,
            ThreadPoolExecutor(3) as threads,
        ):
            found = threads.map(lambda name: answered(loaded.engine, name), (whole, tuned, None))
            assert list(found) == wanted

    await asyncio.to_thread(use)
