"""Who calls is found out once: by whoever refuses before the stages, or by the stage of credentials."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from pathlib import Path

import grpc
import pytest
from grpc import aio
from tests.runtime.conftest import Create, Site, serve

from luthier.runtime import auth
from luthier.runtime.auth import Authenticator, Principal, TaskTokens, current_principal
from luthier.runtime.granted_keys import KEY_ROLES, GrantedKey

Looks = Counter[str]


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Looks:
    """What is done to find out who calls: keys that are digested, tokens whose signature is checked."""
    seen: Looks = Counter()
    digest, verify = auth._sha256, TaskTokens.verify

    def digested(secret: str) -> bytes:
        seen["key"] += 1
        return digest(secret)

    def verified(self: TaskTokens, token: str) -> Principal:
        seen["token"] += 1
        return verify(self, token)

    monkeypatch.setattr(auth, "_sha256", digested)
    monkeypatch.setattr(TaskTokens, "verify", verified)
    return seen


def token_of(site: Site) -> str:
    return TaskTokens(site.keys.token_secret).mint("p", ("projects/p",), 1, "t", 60)


async def test_a_key_is_looked_up_once_in_a_call(site: Site, looks: Looks) -> None:
    looks.clear()
    for _ in range(3):
        await site.create()
    assert looks == {"key": 3}


async def test_a_token_is_checked_once_in_a_call(site: Site, looks: Looks) -> None:
    looks.clear()
    assert (await site.create(metadata=site.metadata(token_of(site)))).uid == "1"
    assert looks == {"token": 1}


async def test_a_key_that_may_not_call_is_looked_up_once(site: Site, looks: Looks) -> None:
    looks.clear()
    with pytest.raises(aio.AioRpcError) as caught:
        await site.create(metadata=site.metadata(site.keys.worker_key))
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert looks == {"key": 1}


async def test_a_stream_s_key_is_looked_up_once(site: Site, looks: Looks) -> None:
    looks.clear()
    stream = site.stream()
    await stream.read()
    stream.cancel()
    assert looks == {"key": 1}


async def test_a_token_that_ends_while_its_call_waits_is_refused(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    before_the_stages = Authenticator.key_holder

    def late(self: Authenticator, authorization: str | None) -> Principal | None:
        found = before_the_stages(self, authorization)
        self._tokens._clock = lambda: 1e12
        return found

    monkeypatch.setattr(Authenticator, "key_holder", late)
    with pytest.raises(aio.AioRpcError) as caught:
        await site.create(metadata=site.metadata(token_of(site)))
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert site.echo.calls == 0


async def test_each_of_many_calls_at_once_has_its_own_caller(tmp_path: Path) -> None:
    granted = tuple(
        GrantedKey(
            name=name,
            digest=hashlib.sha256(f"lk_{name}".encode()).digest(),
            projects=frozenset({name}),
            roles=KEY_ROLES,
        )
        for name in ("one", "two", "three")
    )
    async with serve(tmp_path / "home", granted=granted) as site:
        callers: list[str] = []

        async def tell() -> None:
            await asyncio.sleep(0.01)
            callers.append(str(current_principal()))

        site.echo.behave = tell
        names = [key.name for key in granted] * 2
        answers = await asyncio.gather(
            *(
                site.create(Create(parent=f"projects/{name}"), metadata=site.metadata(f"lk_{name}"))
                for name in names
            )
        )
        assert [answer.name for answer in answers] == [f"projects/{name}" for name in names]
        assert Counter(callers) == {f"key:{name}": 2 for name in ("one", "two", "three")}
        with pytest.raises(aio.AioRpcError) as caught:
            await site.create(Create(parent="projects/two"), metadata=site.metadata("lk_one"))
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
