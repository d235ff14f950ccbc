"""Calls to judges: what fails for a while is asked again, what fails for good is an error; no key is shown."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from tests.work.judge_stub import Stub, judge_stub

from luthier.errors import Cancelled, LuthierError, Reason, Unavailable
from luthier.grading.judging import Matter, pairwise_prompt, read_preference
from luthier.v1.judge_pb2 import JudgeEndpoint
from luthier.work.judge_access import target_of
from luthier.work.judge_calls import CALLS_AT_ONCE, MOST_FAILURES, JudgeAnswer, JudgeCalls

KEY = "sk-0123456789"
MATTER = Matter(criteria="more is better", request="say something", reference=None)


@pytest.fixture(scope="module")
def stub() -> Iterator[Stub]:
    with judge_stub() as running:
        yield running


def calls(
    stub: Stub, model: str, *, key: str = KEY, timeout_seconds: float = 20.0, port: int = 0
) -> JudgeCalls:
    url = f"http://127.0.0.1:{port}/v1" if port else stub.url
    endpoint = JudgeEndpoint(url=url, model=model, timeout_seconds=timeout_seconds)
    return JudgeCalls(endpoint, target_of(url), key, 64)


def prompt(first: str, second: str) -> str:
    return pairwise_prompt(MATTER, first, second)


def errors(found: list[JudgeAnswer | LuthierError]) -> list[LuthierError]:
    assert all(isinstance(one, LuthierError) for one in found), found
    return [one for one in found if isinstance(one, LuthierError)]


def test_a_judge_that_fails_half_of_the_time_judges_all_and_its_failures_are_counted(stub: Stub) -> None:
    asker = calls(stub, "longer-half")
    before = len(stub.seen())
    found = asker.ask([prompt("x" * number, "y" * 10) for number in range(1, 21)])
    said = [read_preference(one.text) for one in found if isinstance(one, JudgeAnswer)]
    assert said == ["SECOND"] * 9 + ["TIE"] + ["FIRST"] * 10
    num_calls = len(stub.seen()) - before
    assert asker.num_repeated == num_calls - 20
    assert asker.num_repeated >= 10, "about every second call failed"


def test_no_more_calls_are_made_than_it_may_have(stub: Stub) -> None:
    asker = calls(stub, "longer-half")
    before = len(stub.seen())
    left_calls = 13

    def take(wanted: int) -> int:
        nonlocal left_calls
        taken = min(wanted, left_calls)
        left_calls -= taken
        return taken

    found = asker.ask([prompt("x", "yy")] * 20, take=take)
    left = [one for one in found if isinstance(one, LuthierError)]
    assert {one.reason for one in left} == {Reason.JUDGE_CALLS_SPENT}
    assert len(stub.seen()) - before == asker.spent().num_calls == 13
    assert 20 - 13 < len(left) < 20, "those that fail take two"
    again = asker.ask([prompt("x", "yy")] * 20)
    assert all(isinstance(one, JudgeAnswer) for one in again), "that it was not asked says nothing of it"
    assert asker.spent().num_calls == len(stub.seen()) - before - 13
    assert asker.spent().num_calls == 0, "told once"


def test_calls_are_taken_before_they_are_made_and_more_where_they_fail(stub: Stub) -> None:
    asker = calls(stub, "longer-half")
    before = len(stub.seen())
    taken: list[int] = []

    def take(wanted: int) -> int:
        assert len(stub.seen()) - before <= sum(taken), "none that was not taken"
        taken.append(wanted)
        return wanted

    asker.ask([prompt("x", "yy")] * 6, take=take)
    assert taken[0] == 12
    assert len(stub.seen()) - before == asker.spent().num_calls <= sum(taken)
    asker = calls(stub, "tie", port=1, timeout_seconds=1.5)
    found: list[int] = []

    def more(wanted: int) -> int:
        found.append(wanted)
        return wanted

    errors(asker.ask(["x"] * 2, take=more))
    assert asker.spent().num_calls > found[0] == 4, "more than were taken at first"


def test_who_is_away_is_given_up_however_few_calls_are_taken_at_a_time(stub: Stub) -> None:
    """A judgement's time goes on while it waits for calls."""
    asker = calls(stub, "tie", port=1, timeout_seconds=1.0)
    began = time.monotonic()
    for _ in range(MOST_FAILURES - 1):
        (error,) = errors(asker.ask(["x"]))
        assert error.reason == Reason.JUDGE_UNAVAILABLE
    with pytest.raises(Unavailable, match="asked no more"):
        asker.ask(["x"])
    assert time.monotonic() - began < 2 * MOST_FAILURES


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        ({"prompt_tokens": 7, "completion_tokens": 2}, (7, 2)),
        ({"prompt_tokens": "7", "completion_tokens": 2}, (0, 2)),
        ({"prompt_tokens": -7, "completion_tokens": True}, (0, 0)),
        ({"prompt_tokens": 10**12}, (0, 0)),
        ([], (0, 0)),
        (None, (0, 0)),
    ],
)
def test_tokens_count_as_far_as_an_endpoint_tells_them(
    stub: Stub, usage: Any, tokens: tuple[int, int]
) -> None:
    asker = calls(stub, "tie")
    for text in ("Better: tie", None):
        choice = {"message": {"content": text}}
        asker._read(json.dumps({"choices": [choice], "usage": usage}).encode())
    spent = asker.spent()
    assert (spent.num_prompt_tokens, spent.num_generated_tokens) == (2 * tokens[0], 2 * tokens[1]), (
        "also of an answer that is no judgement"
    )


def test_what_is_sent_is_openais_protocol(stub: Stub) -> None:
    calls(stub, "tie").ask([prompt("a", "b")])
    sent = stub.seen()[-1]
    assert sent["path"] == "/v1/chat/completions"
    assert sent["authorization"] == f"Bearer {KEY}"
    assert (sent["model"], sent["max_tokens"], sent["temperature"]) == ("tie", 64, 0)
    assert [turn["role"] for turn in sent["messages"]] == ["user"]
    endpoint = JudgeEndpoint(url=stub.url, model="tie", reasons=True)
    JudgeCalls(endpoint, target_of(stub.url), "", 64).ask([prompt("a", "b")])
    sent = stub.seen()[-1]
    assert (sent["max_completion_tokens"], "temperature" in sent, "max_tokens" in sent) == (64, False, False)
    assert sent["authorization"] is None


def test_a_key_that_is_refused_is_asked_once_and_not_shown(stub: Stub) -> None:
    before = len(stub.seen())
    (error,) = errors(calls(stub, "refuse").ask(["x"]))
    assert error.reason == Reason.JUDGE_REFUSED
    assert error.message == f"judge 127.0.0.1:{stub.port}: it answered 401: no such key: Bearer ***"
    assert len(stub.seen()) == before + 1


@pytest.mark.parametrize(
    ("model", "reason", "words"),
    [
        ("moved", Reason.JUDGE_REFUSED, "it answered 307: Temporary Redirect"),
        ("html", Reason.JUDGE_ANSWER_INVALID, "must be a chat completion .* got '<html>a portal</html>'"),
    ],
)
def test_what_is_no_answer_says_what_it_was(stub: Stub, model: str, reason: Reason, words: str) -> None:
    (error,) = errors(calls(stub, model).ask(["x"]))
    assert error.reason == reason
    with pytest.raises(LuthierError, match=words):
        raise error
    assert not [one for one in stub.seen() if one["path"] == "/elsewhere"], "no address that nobody allowed"


def test_an_answer_that_comes_byte_by_byte_has_its_deadline(stub: Stub) -> None:
    began = time.monotonic()
    found = errors(calls(stub, "drip", timeout_seconds=1.0).ask(["x"] * 3))
    assert {one.reason for one in found} == {Reason.JUDGE_UNAVAILABLE}
    assert "no answer within 1 s" in found[0].message
    assert time.monotonic() - began < 5


def test_who_is_away_is_asked_no_more_after_some_failures(stub: Stub) -> None:
    asker = calls(stub, "tie", port=1, timeout_seconds=0.3)
    began = time.monotonic()
    words = f"asked no more after {MOST_FAILURES} failures in a row, the last of them: it cannot be reached"
    with pytest.raises(Unavailable, match=words) as caught:
        asker.ask(["x"] * 100)
    assert caught.value.reason == Reason.JUDGE_UNAVAILABLE
    assert time.monotonic() - began < 10, "not a hundred times its time"


def test_a_portal_that_answers_every_call_is_asked_no_more_either(stub: Stub) -> None:
    before = len(stub.seen())
    found = errors(calls(stub, "html").ask(["x"] * 60))
    assert {one.reason for one in found} == {Reason.JUDGE_ANSWER_INVALID}
    assert f"asked no more after {MOST_FAILURES} failures" in found[-1].message
    assert MOST_FAILURES <= len(stub.seen()) - before < MOST_FAILURES + CALLS_AT_ONCE


def test_who_does_not_want_it_any_more_is_heard_at_once(stub: Stub) -> None:
    ends = threading.Event()

    def check() -> None:
        if ends.is_set():
            raise Cancelled("not wanted")

    threading.Timer(0.5, ends.set).start()
    began = time.monotonic()
    with pytest.raises(Cancelled):
        calls(stub, "drip", timeout_seconds=60.0).ask(["x"] * 20, check)
    assert time.monotonic() - began < 5
