"""What is hinted at can be done: each option that a hint or a refusal names is one of the command's own parser."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import grpc
import pytest
from click.testing import Result

from luthier.client import cli
from luthier.client.cli import main
from luthier.client.cli.hints import hint_of
from luthier.errors import FailedPrecondition, Reason

Run = Callable[..., Result]
ROOT = Path(__file__).parents[2]
CLI = sorted(Path(str(cli.__file__)).parent.glob("*.py"))
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
QUOTED = re.compile(r"`(.*?)`")
VALUE = "VALUE"
"""What stands in this file for what a text has of the moment."""


def tree(
    group: click.Group = main, words: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command by the words that call it."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from tree(command, (*words, name))
        else:
            yield (*words, name), command


COMMANDS = dict(tree())


def options(command: click.Command) -> set[str]:
    return {option for one in command.params for option in (*one.opts, *one.secondary_opts)}


def check_line(line: str) -> None:
    """A command line, without its `luthier`, calls a command that there is, with options that it has."""
    words = line.split()
    found = [name for name in COMMANDS if tuple(words[: len(name)]) == name]
    assert found, f"no command: {line}"
    assert set(OPTION.findall(line)) <= options(COMMANDS[found[0]]), line


def check_text(text: str, *commands: click.Command) -> None:
    """Commands in quotes can be called so; options outside of them are those of the commands, or of the root."""
    for quoted in QUOTED.findall(text):
        if quoted.startswith("luthier "):
            check_line(quoted.removeprefix("luthier "))
    known = options(main).union(*map(options, commands))
    assert set(OPTION.findall(QUOTED.sub("", text))) <= known, text


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_no_hint_names_an_option_that_its_command_has_not(words: tuple[str, ...]) -> None:
    command = COMMANDS[words]
    for reason in Reason:
        for metadata in ({}, {"skippable": "true"}, {"skippable": "false"}):
            error = FailedPrecondition("it is so", reason=reason, metadata=metadata)
            check_text(hint_of(error, command) or "", command)
            check_text(hint_of(error, None) or "")


GENERATE = ("generate", "--model", "m", "hello")
RENDER = ("renderings", "create", "d/v", "--model", "m")
EVALUATE = ("evaluations", "create", "--version", "d/v", "--arm", "a=m")


@pytest.mark.parametrize(
    ("words", "method", "reason", "expected"),
    [
        (GENERATE, "GenerateText", Reason.CHAT_TEMPLATE_MISSING, "continue plain text with --raw"),
        (
            RENDER,
            "CreateRendering",
            Reason.CHAT_TEMPLATE_MISSING,
            "give a chat template with --chat-template FILE",
        ),
        (
            EVALUATE,
            "CreateEvaluation",
            Reason.CHAT_TEMPLATE_MISSING,
            "give the arm a chat template with --template ARM=FILE",
        ),
        (("jobs", "show", "j"), "GetFineTuningJob", Reason.CHAT_TEMPLATE_MISSING, None),
        (
            ("jobs", "show", "j"),
            "GetFineTuningJob",
            Reason.INVALID_RECORDS,
            "`luthier datasets errors VERSION` lists them; a version that `luthier datasets create --policy skip` makes"
            " leaves them out",
        ),
    ],
)
def test_a_hint_is_what_helps_in_the_command_at_hand(
    services: Any, run: Run, words: tuple[str, ...], method: str, reason: str, expected: str | None
) -> None:
    services.answers[method] = lambda request, context: services.refuse(
        context, grpc.StatusCode.FAILED_PRECONDITION, "it is so", reason=reason
    )
    result = run(*words)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[0] == f"error: it is so [{reason}]"
    hints = [line.removeprefix("hint: ") for line in result.stderr.splitlines() if line.startswith("hint: ")]
    assert hints == ([] if expected is None else [expected])


def test_a_version_with_bad_records_hints_at_leaving_them_out() -> None:
    error = FailedPrecondition("it is so", reason=Reason.INVALID_RECORDS, metadata={"skippable": "true"})
    expected = "`luthier datasets errors VERSION` lists them; --policy skip leaves them out"
    assert hint_of(error, COMMANDS["datasets", "create"]) == expected


def said(tree: ast.AST) -> Iterator[str]:
    """The texts of a program, what is of the moment left out."""
    inside = {
        id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(
                str(part.value) if isinstance(part, ast.Constant) else VALUE for part in node.values
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node.value


def calls(path: Path, method: str) -> Iterator[str]:
    """What a file passes to `session.METHOD`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == method:
            yield from said(node)


NEXT = [text for path in CLI for text in calls(path, "hint")]


def test_the_next_commands_can_be_found() -> None:
    assert len(NEXT) > 10


@pytest.mark.parametrize("line", NEXT)
def test_the_next_command_can_be_typed(line: str) -> None:
    if not line.startswith(VALUE):
        check_line(line)


@pytest.mark.parametrize("path", CLI, ids=lambda path: str(path.stem))
def test_notes_name_options_of_their_commands(path: Path) -> None:
    """Those of the commands that the file holds."""
    own = [
        one for one in COMMANDS.values() if getattr(one.callback, "__module__", "").endswith(f".{path.stem}")
    ]
    for text in calls(path, "note"):
        check_text(text, *own)


TEXTS = [
    (path.relative_to(ROOT), text)
    for folder in ("text", "data")
    for path in sorted((ROOT / "services" / "luthier" / folder).rglob("*.py"))
    for text in said(ast.parse(path.read_text()))
    if OPTION.search(text)
]


def test_what_a_rendering_refuses_names_options_that_make_one() -> None:
    making = COMMANDS["renderings", "create"]
    assert len(TEXTS) > 5
    for path, text in TEXTS:
        assert set(OPTION.findall(text)) <= options(making), f"{path}: {text}"


def test_what_is_kept_is_purged_by_an_option_that_deleting_has() -> None:
    """Of what can be undeleted, as `work/keeping.py` says of it."""
    kept = [words[:-1] for words in COMMANDS if words[-1] == "undelete"]
    assert len(kept) > 3
    assert all("--now" in options(COMMANDS[*words, "delete"]) for words in kept)
