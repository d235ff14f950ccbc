"""Which judges may be asked, with which keys: only where the operator lets a key go, and a key is never shown."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from luthier.errors import FailedPrecondition, InvalidArgument, Reason
from luthier.v1.judge_pb2 import JudgeEndpoint
from luthier.work.judge_access import JudgeAccess, target_of

ADDRESSES = ("127.0.0.1", "[::1]", "judge.example.com:443", "plain.example.com")
KEYS = (
    "MY_KEY@judge.example.com:443",
    "MY_KEY@127.0.0.1",
    "/etc/keys/judge@judge.example.com",
    "P@plain.example.com",
)


def endpoint(url: str, key: str = "") -> JudgeEndpoint:
    return JudgeEndpoint(url=url, model="m", key=key)


@pytest.mark.parametrize(
    ("url", "address", "path"),
    [
        ("https://judge.example.com/v1", "judge.example.com:443", "/v1"),
        ("https://Judge.Example.com:443/v1/", "judge.example.com:443", "/v1"),
        ("http://127.0.0.1:8000", "127.0.0.1:8000", ""),
        ("http://[::1]:8000/a/b", "[::1]:8000", "/a/b"),
        ("http://127.0.0.1", "127.0.0.1:80", ""),
    ],
)
def test_require_returns_where_it_is_asked(url: str, address: str, path: str) -> None:
    target = JudgeAccess(ADDRESSES, KEYS).require(endpoint(url), "f")
    assert (target.address, target.path) == (address, path)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "judge.example.com/v1",
        "ftp://127.0.0.1/v1",
        "https://user:word@127.0.0.1/v1",
        "https://127.0.0.1:0/v1",
        "https://127.0.0.1:99999/v1",
        "https://127.0.0.1/v1?a=b",
        "https://127.0.0.1/v1#a",
        "https://127.0.0.1/v1\r\nHost: a",
        "https://127.0.0.1 /v1",
        "https:///v1",
    ],
)
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"must be http:// or https:// with host, port and path alone"):
        target_of(url)


@pytest.mark.parametrize(
    "url",
    ["https://judge.example.com:8443/v1", "https://other.example.com/v1", "http://judge.example.com/v1"],
)
def test_another_host_is_refused_by_name(url: str) -> None:
    with pytest.raises(InvalidArgument, match="which LUTHIER_JUDGE_ADDRESSES allows, got 'http") as caught:
        JudgeAccess(ADDRESSES, KEYS).require(endpoint(url), "f")
    (violation,) = caught.value.violations
    assert (violation.field, violation.reason) == ("f.url", Reason.ADDRESS_NOT_ALLOWED)


@pytest.mark.parametrize(
    ("url", "key", "words"),
    [
        ("https://judge.example.com/v1", "OTHER", r"\(/etc/keys/judge, MY_KEY\), got 'OTHER'"),
        ("https://judge.example.com/v1", "/etc/keys/judge/../other", r"\(/etc/keys/judge, MY_KEY\), got"),
        ("http://[::1]:7/v1", "MY_KEY", r"lets go to \[::1\]:7 \(none\), got 'MY_KEY'"),
        ("http://plain.example.com/v1", "P", "must be empty where the URL is not https://"),
    ],
)
def test_a_key_goes_nowhere_else(url: str, key: str, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words) as caught:
        JudgeAccess(ADDRESSES, KEYS).require(endpoint(url, key), "f")
    (violation,) = caught.value.violations
    assert (violation.field, violation.reason) == ("f.key", Reason.KEY_NOT_ALLOWED)


@pytest.mark.parametrize(
    "entry", ["MY_KEY", "@host", "my key@host", "relative/path@host", "MY_KEY@", "MY_KEY@a b"]
)
def test_an_entry_that_is_none_is_refused(entry: str) -> None:
    with pytest.raises(InvalidArgument, match="LUTHIER_JUDGE_KEYS must hold VARIABLE@host:port or"):
        JudgeAccess(ADDRESSES, (entry,))


def test_a_worker_takes_variables_so_that_no_process_of_its_sees_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MY_KEY", " sk-1\n")
    settings = SimpleNamespace(judge_addresses=ADDRESSES, judge_keys=KEYS)
    access = JudgeAccess.of_worker(settings)
    assert "MY_KEY" not in os.environ
    assert access.key(endpoint("https://judge.example.com/v1", "MY_KEY")) == "sk-1"
    assert access.key(endpoint("https://judge.example.com/v1")) == ""
    file = tmp_path / "judge.key"
    file.write_text("sk-2\n")
    assert access.key(endpoint("https://judge.example.com/v1", str(file))) == "sk-2"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file or directory"),
        (b"", "one word of ASCII letters"),
        (b"sk-secret and more", "one word of ASCII letters"),
        (b"sk-secret\nsk-secret", "one word of ASCII letters"),
        (b"\xff\xfesecret", "it is no text"),
    ],
)
def test_a_key_that_cannot_be_read_is_named_and_not_shown(
    tmp_path: Path, content: bytes | None, words: str
) -> None:
    file = tmp_path / "judge.key"
    if content is not None:
        file.write_bytes(content)
    access = JudgeAccess(ADDRESSES, (f"{file}@127.0.0.1",), {})
    with pytest.raises(FailedPrecondition, match=words) as caught:
        access.key(endpoint("http://127.0.0.1:1", str(file)))
    assert caught.value.reason == Reason.KEY_UNREADABLE
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None, "the cause would hold what was read"
    with pytest.raises(FailedPrecondition, match="'MY_KEY': the variable is not set"):
        JudgeAccess(ADDRESSES, KEYS, {}).key(endpoint("https://judge.example.com/v1", "MY_KEY"))
