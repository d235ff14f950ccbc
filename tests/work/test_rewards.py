"""Calls to reward services: what is wrong with one is an error of its samples, with words, and never a score."""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import grpc
import pytest
from tests.work.reward_services import rewarding

from luthier.errors import Cancelled, InvalidArgument, Reason
from luthier.v1.grader_pb2 import RemoteGrader, Sample
from luthier.v1.reward_service_pb2 import SampleScore, ScoreRequest, ScoreResponse
from luthier.work.rewards import BATCH_BYTES, RewardAddresses, RewardError, scored

LOOPBACK = RewardAddresses(["127.0.0.1"])


def samples(count: int) -> list[Sample]:
    return [Sample(item_json="{}", output_text="x" * number) for number in range(count)]


def by_length(request: ScoreRequest, context: Any) -> ScoreResponse:
    return ScoreResponse(scores=[SampleScore(score=len(one.output_text)) for one in request.samples])


def errors(found: list[float | RewardError]) -> list[RewardError]:
    assert all(isinstance(one, RewardError) for one in found), found
    return [one for one in found if isinstance(one, RewardError)]


def test_scores_come_in_the_order_of_the_samples_in_batches() -> None:
    with rewarding(by_length) as (address, rewards):
        grader = RemoteGrader(address=address, max_batch_size=10)
        assert scored(grader, samples(95), LOOPBACK) == list(range(95))
        assert sorted(len(request.samples) for request in rewards.requests) == [5, *[10] * 9]
        assert scored(RemoteGrader(address=address), samples(0), LOOPBACK) == []


def test_batches_are_small_enough_for_any_server() -> None:
    with rewarding(by_length) as (address, rewards):
        large = [Sample(output_text="x" * (1 << 20))] * 5
        assert scored(RemoteGrader(address=address), large, LOOPBACK) == [1 << 20] * 5
        assert all(request.ByteSize() <= BATCH_BYTES + 100 for request in rewards.requests)


def test_an_error_of_one_sample_is_its_own() -> None:
    def half(request: ScoreRequest, context: Any) -> ScoreResponse:
        return ScoreResponse(
            scores=[
                SampleScore(score=0.5),
                SampleScore(error="no\x1b unit test" + "x" * 2000),
                SampleScore(score=0.0),
                SampleScore(error=""),
                SampleScore(),
                SampleScore(score=math.nan),
                SampleScore(score=-math.inf),
            ]
        )

    with rewarding(half) as (address, _):
        found = scored(RemoteGrader(address=address), samples(7), LOOPBACK)
    assert found[0] == 0.5
    assert found[2] == 0.0
    wrong = errors([found[1], *found[3:]])
    assert [one.reason for one in wrong] == [
        Reason.REWARD_FAILED,
        Reason.REWARD_FAILED,
        Reason.REWARD_SERVICE_INVALID,
        Reason.SCORE_NOT_FINITE,
        Reason.SCORE_NOT_FINITE,
    ]
    assert f"reward service {address}: it could not score this sample: no\x1b unit" in wrong[0].message
    assert len(wrong[0].message) < 1100
    assert "gave no reason" in wrong[1].message
    assert "neither a score nor an error" in wrong[2].message


@pytest.mark.parametrize("count", [0, 3, 5])
def test_a_wrong_number_of_scores_is_none_at_all(count: int) -> None:
    def short(request: ScoreRequest, context: Any) -> ScoreResponse:
        return ScoreResponse(scores=[SampleScore(score=1.0)] * count)

    with rewarding(short) as (address, _):
        wrong = errors(scored(RemoteGrader(address=address), samples(4), LOOPBACK))
    assert {one.reason for one in wrong} == {Reason.REWARD_SERVICE_INVALID}
    assert f"answered {count} scores for 4 samples" in wrong[0].message


def test_a_service_is_asked_no_more_once_too_many_samples_have_no_score() -> None:
    def refuse(request: ScoreRequest, context: Any) -> ScoreResponse:
        return ScoreResponse(scores=[SampleScore(error="out of ink")] * len(request.samples))

    with rewarding(refuse) as (address, rewards):
        grader = RemoteGrader(address=address, max_batch_size=2)
        found = errors(scored(grader, samples(100), LOOPBACK, most_errors=6))
        # Three batches have six; of those that were asked at once with them three more may be on their way.
        assert 3 <= len(rewards.requests) <= 6
    assert {one.reason for one in found} == {Reason.REWARD_FAILED}
    assert "it was asked no more after" in found[-1].message
    assert "out of ink" in found[-1].message


def test_unavailable_is_tried_again_within_the_time() -> None:
    tries = []

    def later(request: ScoreRequest, context: Any) -> ScoreResponse:
        tries.append(time.monotonic())
        if len(tries) < 4:
            context.abort(grpc.StatusCode.UNAVAILABLE, "warming up")
        return by_length(request, context)

    with rewarding(later) as (address, _):
        assert scored(RemoteGrader(address=address), samples(2), LOOPBACK) == [0.0, 1.0]
    pauses = [after - before for before, after in pairwise(tries)]
    assert pauses[-1] > pauses[0]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, Reason.REWARD_FAILED),
        (grpc.StatusCode.INTERNAL, Reason.REWARD_FAILED),
        (grpc.StatusCode.UNKNOWN, Reason.REWARD_FAILED),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.REWARD_FAILED),
        (grpc.StatusCode.UNIMPLEMENTED, Reason.REWARD_SERVICE_INVALID),
    ],
)
def test_a_refused_batch_is_not_tried_again(code: grpc.StatusCode, reason: Reason) -> None:
    def refuse(request: ScoreRequest, context: Any) -> ScoreResponse:
        context.abort(code, "not like this")
        raise AssertionError

    with rewarding(refuse) as (address, rewards):
        wrong = errors(scored(RemoteGrader(address=address), samples(3), LOOPBACK))
        assert len(rewards.requests) == 1
    assert {one.reason for one in wrong} == {reason}
    assert "not like this" in wrong[0].message


def test_a_failing_batch_leaves_the_others_their_scores() -> None:
    def third(request: ScoreRequest, context: Any) -> ScoreResponse:
        if len(request.samples[0].output_text) == 4:
            raise RuntimeError("a bug of the user's")
        return by_length(request, context)

    with rewarding(third) as (address, _):
        found = scored(RemoteGrader(address=address, max_batch_size=2), samples(8), LOOPBACK)
    assert [one for one in found if isinstance(one, float)] == [0.0, 1.0, 2.0, 3.0, 6.0, 7.0]
    assert "a bug of the user's" in errors(found[4:6])[0].message


def test_a_service_that_never_answers_is_given_up_in_time() -> None:
    ends = threading.Event()

    def never(request: ScoreRequest, context: Any) -> ScoreResponse:
        ends.wait(20)
        return by_length(request, context)

    with rewarding(never) as (address, _):
        began = time.monotonic()
        wrong = errors(scored(RemoteGrader(address=address, timeout_seconds=0.5), samples(2), LOOPBACK))
        assert time.monotonic() - began < 5
        ends.set()
    assert {one.reason for one in wrong} == {Reason.REWARD_SERVICE_UNAVAILABLE}
    assert "no answer within 0.5 s" in wrong[0].message


def test_a_service_that_is_not_there_is_given_up_in_time() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and never listened on
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        began = time.monotonic()
        wrong = errors(scored(RemoteGrader(address=address, timeout_seconds=1.0), samples(2), LOOPBACK))
    assert time.monotonic() - began < 6
    assert {one.reason for one in wrong} == {Reason.REWARD_SERVICE_UNAVAILABLE}


def test_a_service_that_comes_late_is_waited_for() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found: list[Any] = []
    grader = RemoteGrader(address=f"127.0.0.1:{port}", timeout_seconds=20)
    asking = threading.Thread(target=lambda: found.extend(scored(grader, samples(2), LOOPBACK)))
    asking.start()
    time.sleep(0.5)
    with rewarding(by_length, port):
        asking.join(20)
    assert found == [0.0, 1.0]


def test_who_does_not_want_it_any_more_is_heard_at_once() -> None:
    ends = threading.Event()

    def never(request: ScoreRequest, context: Any) -> ScoreResponse:
        ends.wait(20)
        return by_length(request, context)

    began = time.monotonic()

    def check() -> None:
        if time.monotonic() - began > 0.3:
            raise Cancelled("enough")

    with rewarding(never) as (address, _):
        with pytest.raises(Cancelled, match="enough"):
            scored(RemoteGrader(address=address), samples(200), LOOPBACK, check)
        assert time.monotonic() - began < 5
        ends.set()


ALLOWED = RewardAddresses(["127.0.0.1", "localhost:7000", "[::1]", "rewards.example.com:443"])


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1:1",
        "127.0.0.1:65535",
        "localhost:7000",
        "LOCALHOST:7000",
        "[::1]:9",
        "rewards.example.com:443",
    ],
)
def test_allowed_addresses_pass(address: str) -> None:
    ALLOWED.require(address, "f")


@pytest.mark.parametrize(
    "address",
    [
        "localhost:7001",
        "127.0.0.2:1",
        "rewards.example.com:80",
        "rewards.example.com.evil.org:443",
        "evil.org:1",
        "127.0.0.1",
        "127.0.0.1:0",
        "127.0.0.1:65536",
        "unix:/tmp/socket",
        "unix:5",
        "dns:///127.0.0.1:1",
        "127.0.0.1:1,evil.org:1",
        "127.0.0.1:1\n",
        "[::2]:9",
        "",
    ],
)
def test_other_addresses_are_refused_by_name(address: str) -> None:
    with pytest.raises(InvalidArgument, match="LUTHIER_REWARD_ADDRESSES allows") as caught:
        ALLOWED.require(address, "grader.remote.address")
    assert caught.value.reason == Reason.ADDRESS_NOT_ALLOWED
    assert [one.field for one in caught.value.violations] == ["grader.remote.address"]
    with pytest.raises(InvalidArgument):
        scored(RemoteGrader(address=address), samples(1), ALLOWED)


@pytest.mark.parametrize("entry", ["http://a", "a:b", "a:0", "a:70000", "", "a b", "*"])
def test_an_entry_that_is_no_address_is_refused(entry: str) -> None:
    with pytest.raises(InvalidArgument, match="must hold host or host:port"):
        RewardAddresses([entry])


def test_no_address_is_allowed_where_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidArgument, match="must be host:port of nobody"):
        RewardAddresses([]).require("127.0.0.1:1", "f")


def test_no_proxy_of_the_environment_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with rewarding(by_length) as (address, _):
        score: Callable[[], list[float | RewardError]] = lambda: scored(  # noqa: E731
            RemoteGrader(address=address, timeout_seconds=5), samples(2), LOOPBACK
        )
        assert score() == [0.0, 1.0]
