"""Key files, task tokens, and logs that tell no secret."""

from __future__ import annotations

import io
import json
import logging
import stat
from pathlib import Path

import pytest

from luthier.errors import FailedPrecondition, Unauthenticated
from luthier.runtime.auth import Authenticator, TaskTokens
from luthier.runtime.keys import read_key, read_or_create_keys
from luthier.runtime.logs import JsonFormatter, bind


def test_keys_are_made_once_for_their_owner_alone(tmp_path: Path) -> None:
    keys = read_or_create_keys(tmp_path)
    assert read_or_create_keys(tmp_path) == keys
    for name in ("api-key", "worker-key", "token-secret"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    assert len({keys.api_key, keys.worker_key, keys.token_secret}) == 3
    assert keys.api_key not in repr(keys)


def test_a_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    read_or_create_keys(tmp_path)
    (tmp_path / "api-key").chmod(0o644)
    with pytest.raises(FailedPrecondition, match="mode 0644; run chmod 600"):
        read_key(tmp_path / "api-key")


def test_a_task_token_names_its_task_and_ends() -> None:
    now = 1000.0
    tokens = TaskTokens("s" * 32, clock=lambda: now)
    token = tokens.mint("p", ("projects/p/models/m",), 3, "t1", 60)
    principal = tokens.verify(token)
    assert (principal.kind, principal.subject, principal.resources) == (
        "task",
        "t1@3",
        ("projects/p/models/m",),
    )
    now = 1060.0
    with pytest.raises(Unauthenticated, match="has expired"):
        tokens.verify(token)


def test_a_task_token_of_another_secret_or_altered_is_refused() -> None:
    tokens = TaskTokens("s" * 32)
    token = tokens.mint("p", ("a",), 1, "t", 60)
    for wrong in (
        TaskTokens("x" * 32).mint("p", ("a",), 1, "t", 60),
        token[:-1] + "0",
        token.replace("lt_", "lt_x"),
    ):
        if wrong != token:
            with pytest.raises(Unauthenticated):
                tokens.verify(wrong)


def test_the_authenticator_tells_the_kinds_apart(tmp_path: Path) -> None:
    keys = read_or_create_keys(tmp_path)
    authenticator = Authenticator(keys)
    assert authenticator.authenticate(f"Bearer {keys.api_key}").kind == "key"
    assert authenticator.authenticate(f"bearer {keys.worker_key}").kind == "worker"
    subject = authenticator.authenticate(f"Bearer {keys.api_key}").subject
    assert subject not in keys.api_key


def test_a_log_line_is_json_with_bound_and_extra_fields() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger("luthier.test_line")
    logger.addHandler(handler)
    logger.propagate = False
    try:
        with bind(request_id="r1"):
            logger.error("it broke: %s", "why", extra={"job": "j1"})
        try:
            raise ValueError("inner")
        except ValueError:
            logger.exception("trace")
    finally:
        logger.removeHandler(handler)
    first, second = (json.loads(line) for line in stream.getvalue().splitlines())
    assert first["message"] == "it broke: why"
    assert (first["level"], first["request_id"], first["job"]) == ("ERROR", "r1", "j1")
    assert "request_id" not in second
    assert "ValueError: inner" in second["trace"]


def test_a_field_is_cut_however_long_what_it_says_is() -> None:
    record = logging.makeLogRecord(
        {"msg": "m", "subject": "s" * 4_000_000, "detail": "d" * 501, "number": 10**600}
    )
    with bind(project="p" * 4_000_000):
        line = json.loads(JsonFormatter().format(record))
    assert [len(line[name]) for name in ("subject", "detail", "project")] == [500, 500, 500]
    assert line["number"] == 10**600
