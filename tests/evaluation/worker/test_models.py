"""One base model in memory: shared, changed when free, with adapters that come and go, and no file left over."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.evaluation.here import Here
from tests.evaluation.peer_servers import digest_of
from tests.evaluation.tiny_models import write_base
from tests.evaluation.worker.conftest import Bench

from luthier.errors import Cancelled, DataLoss, LuthierError, NotFound, Reason, ResourceExhausted
from luthier.evaluation.worker.loaded_model import LoadedModel
from luthier.evaluation.worker.models import MAX_WAITING, Models
from luthier.evaluation.worker.room import Room
from luthier.work.cache import BlobCache
from luthier.worker.v1 import task_pb2


async def test_two_users_share_one_base_and_its_files_come_once(bench: Bench) -> None:
    def use() -> None:
        with closing(bench.models()) as models:
            with models.base(bench.reference("base"), bench.token) as first:
                with models.base(bench.reference("base"), bench.token) as second:
                    assert first is second
                assert first.engine.unfit([]) == [], "the other user is still there"
            downloads = bench.site.models.downloads
            with models.base(bench.reference("other"), bench.token):
                pass
            with models.base(bench.reference("base"), bench.token) as again:
                assert again is not first
            # Only the other's weights are new: its tokenizer is the same, and the base is in the cache.
            assert bench.site.models.downloads - downloads == 1
            assert list(bench.folder.iterdir()) == []

    await asyncio.to_thread(use)


async def test_another_base_waits_until_the_first_is_free(bench: Bench) -> None:
    order: list[str] = []

    def use() -> None:
        with closing(bench.models()) as models, ThreadPoolExecutor(1) as threads:

            def other() -> None:
                with models.base(bench.reference("other"), bench.token):
                    order.append("other")

            with models.base(bench.reference("base"), bench.token):
                waiting = threads.submit(other)
                with pytest.raises(TimeoutError):
                    waiting.result(timeout=0.3)
                order.append("base")
            waiting.result(timeout=20)

    await asyncio.to_thread(use)
    assert order == ["base", "other"]


async def test_who_gives_up_waiting_for_a_base_is_let_go(bench: Bench) -> None:
    def stopped() -> None:
        raise Cancelled("nobody listens")

    def use() -> None:
        with closing(bench.models()) as models, models.base(bench.reference("base"), bench.token):
            with (
                pytest.raises(Cancelled, match="nobody listens"),
                models.base(bench.reference("other"), bench.token, stopped),
            ):
                raise AssertionError("the other base must not be loaded")
            with models.base(bench.reference("base"), bench.token, stopped):
                pass  # no wait, no check

    await asyncio.to_thread(use)


async def test_a_wait_with_a_bound_ends_and_few_wait_at_once(bench: Bench) -> None:
    def want(models: Models, wait_seconds: float) -> float:
        began = time.monotonic()
        with (
            pytest.raises(ResourceExhausted, match="another one is in use; try again") as caught,
            models.base(bench.reference("other"), bench.token, wait_seconds=wait_seconds),
        ):
            raise AssertionError("the other base must not be loaded")
        assert caught.value.retry_after_seconds is not None
        assert caught.value.reason == Reason.OVERLOADED
        return time.monotonic() - began

    def use() -> None:
        with (
            closing(bench.models()) as models,
            models.base(bench.reference("base"), bench.token),
            ThreadPoolExecutor(MAX_WAITING) as threads,
        ):
            waiting = [threads.submit(want, models, 1.0) for _ in range(MAX_WAITING)]
            time.sleep(0.3)
            assert want(models, 60.0) < 0.3, "one more is refused at once"
            assert all(1.0 <= one.result(timeout=20) < 2.0 for one in waiting)
            with models.base(bench.reference("base"), bench.token, wait_seconds=0.0):
                pass  # what is loaded is free for everyone

    await asyncio.to_thread(use)


async def test_a_base_that_loads_does_not_silence_those_who_wait(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading, go_on = threading.Event(), threading.Event()
    load = Models._load

    def slow(models: Models, *others: Any) -> Any:
        loading.set()
        go_on.wait(20)
        return load(models, *others)

    def stopped() -> None:
        raise Cancelled("nobody listens")

    monkeypatch.setattr(Models, "_load", slow)

    def use() -> None:
        with closing(bench.models()) as models, ThreadPoolExecutor(2) as threads:

            def same() -> str:
                with models.base(bench.reference("other"), bench.token, wait_seconds=0.1) as loaded:
                    return loaded.digest

            first = threads.submit(same)
            assert loading.wait(20)
            second = threads.submit(same)
            for name in ("base", "other"):
                with (
                    pytest.raises(Cancelled, match="nobody listens"),
                    models.base(bench.reference(name), bench.token, stopped),
                ):
                    raise AssertionError("nothing is loaded yet")
            with (
                pytest.raises(ResourceExhausted, match="must wait: this worker loads another base model"),
                models.base(bench.reference("base"), bench.token, wait_seconds=0.2),
            ):
                raise AssertionError("the other base is on its way")
            assert not second.done(), "who wants what is being loaded waits for it"
            go_on.set()
            assert {first.result(20), second.result(20)} == {bench.reference("other").digest}

    await asyncio.to_thread(use)


async def test_a_base_that_is_taken_while_another_ones_files_come_is_waited_for(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    coming, go_on, checked = threading.Event(), threading.Event(), threading.Event()
    fetched = Models._fetched

    @contextmanager
    def slow(models: Models, *others: Any) -> Iterator[Path]:
        with fetched(models, *others) as folder:
            coming.set()
            go_on.wait(20)
            yield folder

    monkeypatch.setattr(Models, "_fetched", slow)

    def use() -> None:
        with closing(bench.models()) as models, ThreadPoolExecutor(2) as threads:

            def other(wait_seconds: float) -> str:
                wanted, token = bench.reference("other"), bench.token
                with models.base(wanted, token, checked.set, wait_seconds=wait_seconds) as loaded:
                    return loaded.digest

            def taken_meanwhile(wait_seconds: float, error: type[Exception], seconds: float) -> Future[str]:
                go_on.clear()
                coming.clear()
                waiting = threads.submit(other, wait_seconds)
                assert coming.wait(20), "nobody uses the base that is there"
                with models.base(bench.reference("base"), bench.token) as again:
                    assert again is base
                    checked.clear()
                    go_on.set()
                    with pytest.raises(error):
                        waiting.result(seconds)
                    assert checked.is_set(), "it hears meanwhile whether it still should"
                    assert base.engine.ended is None
                return waiting

            go_on.set()
            with models.base(bench.reference("base"), bench.token) as base:
                pass
            taken_meanwhile(0.3, ResourceExhausted, 20)
            waiting = taken_meanwhile(math.inf, TimeoutError, 0.5)
            assert waiting.result(20) == bench.reference("other").digest
            assert base.engine.ended is not None

    await asyncio.to_thread(use)


async def test_a_base_that_cannot_be_loaded_leaves_room_for_the_next(bench: Bench) -> None:
    empty = bench.site.home / "empty"
    empty.mkdir()
    bench.site.models.folders["empty"] = empty

    def use() -> None:
        with closing(bench.models()) as models:
            for wrong, kind, said in (
                (bench.reference("empty"), NotFound, "must hold config.json"),
                (bench.reference("unknown", "d" * 64), LuthierError, "unknown"),
                (task_pb2.ModelReference(name="m"), DataLoss, "m has no digest"),
            ):
                with pytest.raises(kind, match=said), models.base(wrong, bench.token):
                    pass
            assert list(bench.folder.iterdir()) == []
            with models.base(bench.reference("base"), bench.token) as loaded:
                assert loaded.digest == bench.reference("base").digest

    await asyncio.to_thread(use)


async def test_who_gives_up_fetching_a_base_or_an_adapter_is_let_go(bench: Bench) -> None:
    """The service of the models is away: without `check` each would be tried for two minutes."""
    stop_at = [0.0]

    def check() -> None:
        if time.monotonic() > stop_at[0]:
            raise Cancelled("nobody listens")

    def fetched(models: Models, loaded: LoadedModel) -> list[AbstractContextManager[Any]]:
        return [
            models.base(bench.reference("other"), bench.token, check),
            models.adapter(loaded, bench.reference("tuned"), bench.token, check),
            # Another one is on its way, and holds what adapters are put in with.
            models.adapter(loaded, bench.reference("tuned"), bench.token, check),
        ]

    def give_up(one: AbstractContextManager[Any]) -> float:
        with pytest.raises(Cancelled, match="nobody listens"), one:
            raise AssertionError("nobody can have loaded it")
        return time.monotonic() - stop_at[0]

    def use() -> list[float]:
        cold = BlobCache(bench.site.home / "cold", 1 << 30)
        away = Models("127.0.0.1:1", cold, bench.site.home / "away", Here)
        with (
            closing(bench.models()) as models,
            models.base(bench.reference("base"), bench.token) as loaded,
            closing(away),
            ThreadPoolExecutor(3) as threads,
        ):
            stop_at[0] = time.monotonic() + 2.0
            return list(threads.map(give_up, fetched(away, loaded)))

    assert max(await asyncio.to_thread(use)) < 1.0


async def test_a_name_that_means_another_model_by_now_is_refused_and_the_model_of_its_digest_is_not_taken_for_it(
    bench: Bench,
) -> None:
    folders = bench.site.models.folders
    pinned = {name: bench.reference(name) for name in ("base", "tuned", "other")}
    found = {"base": folders["other"], "tuned": folders["tuned-more"]}

    def refused(reference: task_pb2.ModelReference, block: AbstractContextManager[Any]) -> None:
        with pytest.raises(DataLoss, match="was deleted and its name used again") as caught, block:
            raise AssertionError("another model must not be loaded")
        actual = digest_of(folders[reference.name.rpartition("/")[2]])
        assert caught.value.reason == Reason.CHECKSUM_MISMATCH
        assert caught.value.metadata == {
            "name": reference.name,
            "expected": reference.digest,
            "actual": actual,
        }
        for said in (reference.name, reference.digest, actual):
            assert said in caught.value.message

    def use() -> None:
        with closing(bench.models()) as models:
            bench.site.models.folders.update(found)
            refused(pinned["base"], models.base(pinned["base"], bench.token))
            # It was not kept under the digest that it has not.
            refused(pinned["base"], models.base(pinned["base"], bench.token))
            assert bench.site.models.downloads == 0
            with models.base(pinned["other"], bench.token) as loaded:
                refused(pinned["tuned"], models.adapter(loaded, pinned["tuned"], bench.token))
            with models.base(bench.reference("base"), bench.token) as again:
                assert again is loaded, "what is asked for by its own digest is there"

    await asyncio.to_thread(use)


async def test_what_an_earlier_process_laid_out_is_deleted(bench: Bench) -> None:
    left = bench.folder / "tmp-of-the-dead"
    left.mkdir(parents=True)
    with closing(bench.models()):
        assert not left.exists()


async def test_bases_that_fit_stay_and_the_longest_unused_leave_for_one_more(bench: Bench) -> None:
    """Two fit, whatever their sizes."""
    room = Room(fits=lambda needed, held: 0 < held < 2 * needed, is_short=lambda: False)
    folders = bench.site.models.folders
    folders["third"] = bench.site.home / "third"
    folders["third"].mkdir()
    write_base(folders["third"], 7)

    def use() -> None:
        with closing(bench.models(room)) as models:

            def used(name: str) -> LoadedModel:
                with models.base(bench.reference(name), bench.token) as loaded:
                    return loaded

            base, other = used("base"), used("other")
            assert used("base") is base
            third = used("third")
            assert used("base") is base
            assert used("third") is third
            assert used("other") is not other
            with models.base(bench.reference("third"), bench.token) as held:
                assert held is third
                assert used("base") is not base, "in use is what stays, not what was used last"
                assert used("third") is third

    await asyncio.to_thread(use)


async def test_where_memory_is_short_a_base_that_nobody_uses_leaves(bench: Bench) -> None:
    short = [False]
    room = Room(fits=lambda needed, held: True, is_short=lambda: short[0])

    def use() -> None:
        with closing(bench.models(room)) as models:
            with models.base(bench.reference("base"), bench.token) as base:
                with models.base(bench.reference("other"), bench.token) as other:
                    models.relieve()
                    assert (base.engine.ended, other.engine.ended) == (None, None), "there is enough"
                short[0] = True
                models.relieve()
                assert other.engine.ended is not None
                models.relieve()
                assert base.engine.ended is None, "it is in use"
            with models.base(bench.reference("other"), bench.token) as again:
                assert again is not other

    await asyncio.to_thread(use)
