"""A conversation on the command line."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import Result

from luthier.v1.evaluation_service_pb2 import GenerateTextResponse

Run = Callable[..., Result]


@pytest.fixture
def asked(services: Any) -> list[list[tuple[str, str]]]:
    """What the model was asked, call by call: it answers with how many words it was told last."""
    calls: list[list[tuple[str, str]]] = []

    def generate(request: Any, context: Any) -> Iterator[GenerateTextResponse]:
        messages = [(one.role, one.content) for one in request.conversation.messages]
        calls.append(messages)
        if messages[-1][1] == "fail":
            services.refuse(context, grpc.StatusCode.INVALID_ARGUMENT, "too long", reason="SEQUENCE_TOO_LONG")
        yield GenerateTextResponse(text=f"{len(messages[-1][1].split())} ")
        yield GenerateTextResponse(text="words")

    services.answers["GenerateText"] = generate
    return calls


def test_all_that_was_said_is_remembered(run: Run, asked: list[Any]) -> None:
    result = run("generate", "--model", "m", "--chat", "--system", "Count.", stdin="hello there\n\nand now\n")
    assert result.exit_code == 0, result.output
    assert result.stdout == "2 words\n2 words\n"
    assert asked[1] == [
        ("system", "Count."),
        ("user", "hello there"),
        ("assistant", "2 words"),
        ("user", "and now"),
    ]


def test_a_prompt_is_the_first_line(run: Run, asked: list[Any]) -> None:
    result = run("generate", "one", "--model", "m", "--chat", stdin="two\n")
    assert result.exit_code == 0, result.output
    assert [call[-1] for call in asked] == [("user", "one"), ("user", "two")]


def test_what_begins_with_a_slash_is_for_the_conversation(run: Run, asked: list[Any]) -> None:
    lines = ["one", "/undo", "two", "/reset", "three", "/system Be brief.", "four", "/what", "/exit", "five"]
    result = run("generate", "--model", "m", "--chat", stdin="\n".join(lines))
    assert result.exit_code == 0, result.output
    assert asked == [
        [("user", "one")],
        [("user", "two")],
        [("user", "three")],
        [("system", "Be brief."), ("user", "four")],
    ]
    assert "/what is not known" in result.stderr


def test_where_nobody_is_there_to_go_on_an_error_ends_it(run: Run, asked: list[Any]) -> None:
    result = run("generate", "--model", "m", "--chat", stdin="one\nfail\ntwo\n")
    assert result.exit_code == 1
    assert "too long [SEQUENCE_TOO_LONG]" in result.stderr
    assert len(asked) == 2


def test_for_programs_each_piece_is_a_line(run: Run, asked: list[Any]) -> None:
    result = run("generate", "--model", "m", "--chat", "--json", stdin="one\n")
    assert [json.loads(line)["text"] for line in result.stdout.splitlines()] == ["1 ", "words"]


def test_a_chat_needs_a_template(run: Run) -> None:
    result = run("generate", "--model", "m", "--chat", "--raw", stdin="one\n")
    assert result.exit_code == 2
    assert "--system and --chat need a chat template" in result.stderr


def test_at_a_terminal_an_error_ends_only_its_turn(asked: list[Any], arguments: list[str]) -> None:
    """The next turn does not have what failed."""
    program = Path(sys.executable).with_name("luthier")
    leader, follower = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LUTHIER_")}
    process = subprocess.Popen(
        [program, *arguments, "generate", "--model", "m", "--chat"],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env=environment,
    )
    os.close(follower)
    shown = b""

    def say(text: str, then: bytes) -> None:
        nonlocal shown
        os.write(leader, f"{text}\n".encode())
        deadline = time.monotonic() + 30
        while then not in shown.partition(text.encode())[2]:
            assert time.monotonic() < deadline, shown
            shown += os.read(leader, 4096)

    try:
        say("fail", b"SEQUENCE_TOO_LONG")
        say("three words here", b"3 words")
        os.write(leader, b"/exit\n")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(leader)
    assert asked == [[("user", "fail")], [("user", "three words here")]]
