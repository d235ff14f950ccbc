"""Calls to judges over OpenAI's protocol: deadlines, retries, and a key that is sent and never shown.

What goes wrong is an error of the judgement that it happened to, and never a score.
"""

from __future__ import annotations

import http.client
import json
import math
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from luthier.errors import FailedPrecondition, LuthierError, Reason, ResourceExhausted, Unavailable
from luthier.v1.judge_pb2 import JudgeEndpoint
from luthier.work.judge_access import Target
from luthier.work.limited import Check
from luthier.work.peers import Backoff
from luthier.work.retry import HEAR_SECONDS

TIMEOUT_SECONDS = 60.0
MOST_FAILURES = 10
"""Calls in a row that fail for good, after which a judge is asked no more."""
CALLS_AT_ONCE = 4
CALLS_A_JUDGEMENT = 2
"""Calls that are taken at a time for each judgement: one, and another one as some fail."""
_CUT_SECONDS = 0.05
_MAX_ANSWER_BYTES = 1 << 20
_MESSAGE_CHARACTERS = 500
_MOST_TOKENS = 10**9
"""Of one answer. An endpoint that tells of more does not count tokens."""
_PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""Statuses of answers that another call may not get."""


Take = Callable[[int], int]
"""Says how many of so many calls may be made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeAnswer:
    """What a judge said. `is_cut`: it was not done when its longest answer was reached."""

    text: str
    is_cut: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """Calls that were made, and tokens that they took as far as the endpoint said so."""

    num_calls: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0


class JudgeCalls:
    """Asks one endpoint, a few calls at once.

    Args:
        endpoint: which, and how long it may take; it is allowed already.
        target: where.
        key: what it is sent; empty: nothing.
        max_new_tokens: longest answer.

    Attributes:
        num_repeated: calls that failed and were made again.
    """

    def __init__(self, endpoint: JudgeEndpoint, target: Target, key: str, max_new_tokens: int) -> None:
        self._endpoint = endpoint
        self._target = target
        self._key = key
        self._max_new_tokens = max_new_tokens
        self._timeout_seconds = endpoint.timeout_seconds or TIMEOUT_SECONDS
        self._lock = threading.Lock()
        self._open: dict[socket.socket, float] = {}
        self._is_unwanted = False
        self._num_failures = 0
        self._last_failure: LuthierError | None = None
        self._num_left = 0
        self._is_spent = False
        self._spent = Spent()
        self.num_repeated = 0

    def spent(self) -> Spent:
        """Return what was spent since this was asked last, and give back what was taken and is left."""
        with self._lock:
            self._num_left = 0
            found, self._spent = self._spent, Spent()
        return found

    def ask(
        self, prompts: Sequence[str], check: Check = lambda: None, take: Take = lambda wanted: wanted
    ) -> list[JudgeAnswer | LuthierError]:
        """Return what it says to each prompt, in their order; JUDGE_CALLS_SPENT to those that no call was left for.

        Each has `timeout_seconds`, calls that are repeated included. After `MOST_FAILURES` in a row without an answer
        it is asked no more. `check` is called while it waits, from this thread; what it raises ends the calls. So is
        `take`, which says how many of some calls may be made; none is made before.

        Raises Unavailable JUDGE_UNAVAILABLE where it is asked no more because it is away, which may pass.
        """
        self._take(CALLS_A_JUDGEMENT * len(prompts), take)
        with ThreadPoolExecutor(CALLS_AT_ONCE, thread_name_prefix="judge") as threads:
            waiting = [threads.submit(self._answer, prompt) for prompt in prompts]
            try:
                while wait(waiting, timeout=HEAR_SECONDS).not_done:
                    check()
                    self._hang_up(time.monotonic())
                    self._take_more(take)
            except BaseException:
                self._is_unwanted = True
                for one in waiting:
                    one.cancel()
                # Again and again: one that is connecting has no line yet that could be cut.
                while wait(waiting, timeout=_CUT_SECONDS).not_done:
                    self._hang_up(math.inf)
                raise
            found = [one.result() for one in waiting]
        last = self._last_failure
        if isinstance(last, Unavailable) and self._is_given_up:
            raise self._gave_up(last)
        return found

    def _take_more(self, take: Take) -> None:
        if self._num_left < CALLS_AT_ONCE and not self._is_spent:
            self._take(CALLS_A_JUDGEMENT * CALLS_AT_ONCE, take)

    def _take(self, wanted: int, take: Take) -> None:
        taken = take(wanted)
        with self._lock:
            self._num_left += taken
            self._is_spent = taken < wanted

    def _answer(self, prompt: str) -> JudgeAnswer | LuthierError:
        last = self._last_failure
        if last is not None and self._is_given_up:
            return self._gave_up(last)
        try:
            answer = self._repeated(prompt)
        except LuthierError as error:
            answer = error
        with self._lock:
            if self._is_given_up or _is_of_no_call(answer):
                return answer
            if not isinstance(answer, LuthierError):
                self._num_failures = 0
            else:
                self._num_failures += 1
                self._last_failure = answer
        return answer

    @property
    def _is_given_up(self) -> bool:
        return self._num_failures >= MOST_FAILURES

    def _gave_up(self, last: LuthierError) -> LuthierError:
        said = last.message.removeprefix(f"{self._name}: ")
        words = f"it was asked no more after {MOST_FAILURES} failures in a row, the last of them: {said}"
        return self._error(type(last), last.reason, words)

    def _repeated(self, prompt: str) -> JudgeAnswer | LuthierError:
        deadline = time.monotonic() + self._timeout_seconds
        backoff = Backoff(0.2, 10.0)
        is_repeated = False
        while True:
            self._count_call(is_repeated=is_repeated)
            try:
                return self._called(prompt, deadline)
            except Unavailable as error:
                delay_seconds = backoff.after(error)
                if self._is_unwanted or time.monotonic() + delay_seconds > deadline:
                    raise
            self._sleep(delay_seconds)
            is_repeated = True

    def _count_call(self, *, is_repeated: bool) -> None:
        """Count a call that is made now, once there is one left."""
        while not self._is_counted(is_repeated=is_repeated):
            if self._is_spent or self._is_unwanted:
                most = f"all {self._endpoint.max_calls:,} calls that the evaluation lets it have (max_calls)"
                raise self._error(ResourceExhausted, Reason.JUDGE_CALLS_SPENT, f"{most} were made")
            time.sleep(_CUT_SECONDS)

    def _is_counted(self, *, is_repeated: bool) -> bool:
        with self._lock:
            if not self._num_left:
                return False
            self._num_left -= 1
            self._spent = replace(self._spent, num_calls=self._spent.num_calls + 1)
            self.num_repeated += is_repeated
            return True

    def _sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not self._is_unwanted:
            time.sleep(min(left, HEAR_SECONDS))

    def _called(self, prompt: str, deadline: float) -> JudgeAnswer | LuthierError:
        try:
            with self._connected(deadline) as connection:
                response, data = self._exchanged(connection, prompt)
        except (OSError, http.client.HTTPException) as error:
            late = time.monotonic() > deadline
            words = (
                f"no answer within {self._timeout_seconds:g} s" if late else f"it cannot be reached: {error}"
            )
            raise self._error(Unavailable, Reason.JUDGE_UNAVAILABLE, words) from None
        if response.status != http.client.OK:
            raise self._refusal(response, data)
        return self._read(data)

    def _exchanged(
        self, connection: http.client.HTTPConnection, prompt: str
    ) -> tuple[http.client.HTTPResponse, bytes]:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "luthier"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        connection.request("POST", f"{self._target.path}/chat/completions", self._body(prompt), headers)
        with closing(connection.getresponse()) as response:
            data = response.read(_MAX_ANSWER_BYTES + 1)
            # A read of so many bytes does not say that the line broke.
            if response.length and len(data) <= _MAX_ANSWER_BYTES:
                raise http.client.IncompleteRead(data, response.length)
            return response, data

    @contextmanager
    def _connected(self, deadline: float) -> Iterator[http.client.HTTPConnection]:
        target, seconds = self._target, max(deadline - time.monotonic(), 0.001)
        host = target.host.strip("[]")
        # No proxy, whatever the environment says, and no redirection: an address means host and port.
        connection = (
            http.client.HTTPSConnection(
                host, target.port, timeout=seconds, context=ssl.create_default_context()
            )
            if target.scheme == "https"
            else http.client.HTTPConnection(host, target.port, timeout=seconds)
        )
        try:
            connection.connect()
            # An answer that ends the connection takes the line with it, so that only whoever opened it can cut it.
            line = connection.sock
            with self._lock:
                self._open[line] = deadline
            try:
                yield connection
            finally:
                with self._lock:
                    del self._open[line]
        finally:
            connection.close()

    def _hang_up(self, now: float) -> None:
        """End calls that are beyond their time: each part of an answer may come in time and the whole never."""
        with self._lock:
            late = [line for line, deadline in self._open.items() if deadline < now]
            for line in late:
                with suppress(OSError):
                    line.shutdown(socket.SHUT_RDWR)

    def _body(self, prompt: str) -> bytes:
        limits: dict[str, Any] = (
            {"max_completion_tokens": self._max_new_tokens}
            if self._endpoint.reasons
            else {"max_tokens": self._max_new_tokens, "temperature": 0}
        )
        messages = [{"role": "user", "content": prompt}]
        body = {"model": self._endpoint.model, "messages": messages, **limits}
        return json.dumps(body).encode()

    def _refusal(self, response: http.client.HTTPResponse, data: bytes) -> LuthierError:
        said = self._shown(data)
        words = f"it answered {response.status}: {said or response.reason}"
        if response.status not in _PASSING:
            return self._error(FailedPrecondition, Reason.JUDGE_REFUSED, words)
        error = self._error(Unavailable, Reason.JUDGE_UNAVAILABLE, words)
        wanted = response.headers.get("Retry-After", "")
        if wanted.isascii() and wanted.isdigit():
            error.retry_after_seconds = float(wanted[:6])
        return error

    def _read(self, data: bytes) -> JudgeAnswer | LuthierError:
        try:
            answer = json.loads(data)
            self._count_tokens(answer)
            choice = answer["choices"][0]
            text = choice["message"]["content"]
        except (ValueError, TypeError, KeyError, IndexError, RecursionError):
            text = None
        if not isinstance(text, str) or len(data) > _MAX_ANSWER_BYTES:
            shown = self._shown(data)
            words = f"its answer must be a chat completion with a text of at most 1 MiB in all, got {shown!r}"
            return self._error(FailedPrecondition, Reason.JUDGE_ANSWER_INVALID, words)
        # A text is stored, and one with halves of characters cannot be.
        text = text.encode("utf-8", "replace").decode()
        return JudgeAnswer(text=self._without_key(text), is_cut=choice.get("finish_reason") == "length")

    def _count_tokens(self, answer: dict[str, Any]) -> None:
        """Add what an answer says that it took; not every endpoint says it, and none is believed what cannot be."""
        usage = answer.get("usage") if isinstance(answer, dict) else None
        if not isinstance(usage, dict):
            return
        asked, written = (_told(usage.get(name)) for name in ("prompt_tokens", "completion_tokens"))
        with self._lock:
            self._spent = replace(
                self._spent,
                num_prompt_tokens=self._spent.num_prompt_tokens + asked,
                num_generated_tokens=self._spent.num_generated_tokens + written,
            )

    @property
    def _name(self) -> str:
        return f"judge {self._target.address}"

    def _error(self, kind: type[LuthierError], reason: str, words: str) -> LuthierError:
        return kind(f"{self._name}: {self._without_key(words)}", reason=reason)

    def _shown(self, data: bytes) -> str:
        # Cut once the key is out of it: half of a key would not be found.
        text = self._without_key(data.decode(errors="replace"))
        return " ".join(text.split())[:_MESSAGE_CHARACTERS]

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def _is_of_no_call(answer: JudgeAnswer | LuthierError) -> bool:
    """Tell whether nobody was called: that says nothing of the endpoint."""
    return isinstance(answer, LuthierError) and answer.reason == Reason.JUDGE_CALLS_SPENT


def _told(value: Any) -> int:
    """Return a number of tokens as it was told; 0 for what is none."""
    is_count = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST_TOKENS
    return value if is_count else 0
