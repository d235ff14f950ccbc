"""What a grader may be: every limit by its words, and hostile graders."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.grading.grader_messages import (
    json_match,
    multi,
    number_match,
    regex,
    remote,
    reward_model,
    similarity,
    string_check,
)

from luthier.grading.checks import grader_violations
from luthier.v1.grader_pb2 import Grader, ScoreRange


def violations(grader: Grader) -> list[str]:
    return [f"{one.field}: {one.description}" for one in grader_violations(grader, "grader")]


@pytest.mark.parametrize(
    "grader",
    [
        string_check("EQ", reference=""),
        similarity("BLEU"),
        regex("a+"),
        json_match(fields=["a"]),
        number_match(pattern="x(.)", absolute_tolerance=1.0),
        remote("localhost:50051", timeout_seconds=600, max_batch_size=256),
        remote("[::1]:50051", range=ScoreRange(min=-1, max=1)),
        multi("a * b + inner", a=regex("x"), b=remote(), inner=multi("c", c=similarity("GLEU"))),
    ],
)
def test_right_graders_pass(grader: Grader) -> None:
    assert violations(grader) == []


def deep(levels: int) -> Grader:
    grader = regex("x")
    for _ in range(levels):
        grader = multi("a", a=grader)
    return grader


def wide() -> Grader:
    inner = {
        f"g{number}": multi("+".join("abc"), a=regex("x"), b=regex("x"), c=regex("x")) for number in range(10)
    }
    return multi("g1", **inner)


WRONG: list[tuple[Callable[[], Grader], str]] = [
    (
        Grader,
        "grader: must be one of string_check, text_similarity, multi, json_match, number_match, regex, remote, "
        "reward_model, got",
    ),
    (
        lambda: Grader(name="x" * 65, regex=regex("a").regex),
        "grader.name: must be at most 64 characters, got 65",
    ),
    (lambda: Grader(name="\x1b[31m", regex=regex("a").regex), "grader.name: must hold no control characters"),
    (lambda: string_check(text=""), "grader.string_check.input: must be set, got nothing"),
    (
        lambda: string_check(text="x" * 4097),
        "grader.string_check.input: must be at most 4096 characters, got 4097",
    ),
    (
        lambda: string_check("UNSPECIFIED"),
        "grader.string_check.operation: must be one of EQ, NE, LIKE, ILIKE, got number 0",
    ),
    (
        lambda: similarity("UNSPECIFIED"),
        "grader.text_similarity.evaluation_metric: must be one of FUZZY_MATCH, BLEU",
    ),
    (
        lambda: similarity("BLEU", reference="{{item.x"),
        "grader.text_similarity.reference: {{ at character 0 must be closed",
    ),
    (lambda: string_check(text="{{secret.x}}"), "grader.string_check.input: must name item or sample"),
    (lambda: string_check(text="constant"), "grader: must read the answer, as {{sample.output_text}} does"),
    (lambda: multi("a", a=string_check(text="{{item.x}}")), "grader: must read the answer"),
    (lambda: regex(""), "grader.regex.pattern: must be set, got nothing"),
    (lambda: regex("["), "grader.regex.pattern: must be a regular expression of RE2: missing ]"),
    (
        lambda: regex(r"(\pL{50}){15}"),
        "grader.regex.pattern: must be a regular expression of RE2: pattern too large",
    ),
    (lambda: regex("a" * 1001), "grader.regex.pattern: must be at most 1000 characters, got 1001"),
    (
        lambda: json_match(fields=["x"] * 101),
        "grader.json_match.fields: must hold at most 100 fields, got 101",
    ),
    (
        lambda: json_match(fields=["x" * 201]),
        "grader.json_match.fields[0]: must be at most 200 characters, got 201",
    ),
    (
        lambda: number_match(pattern="x"),
        "grader.number_match.pattern: must have one group, which holds the number, got 0",
    ),
    (lambda: number_match(pattern="(x)(y)"), "grader.number_match.pattern: must have one group"),
    (lambda: number_match(pattern="("), "grader.number_match.pattern: must be a regular expression of RE2"),
    (
        lambda: number_match(absolute_tolerance=-1.0),
        "grader.number_match.absolute_tolerance: must be in 0..1e+300, got -1",
    ),
    (
        lambda: number_match(relative_tolerance=float("nan")),
        "grader.number_match.relative_tolerance: must be in 0..1e+300, got nan",
    ),
    (lambda: multi("a"), "grader.multi.graders: must hold 1 to 16 graders, got 0"),
    (
        lambda: multi("a", **{f"g{number}": regex("x") for number in range(17)}),
        "grader.multi.graders: must hold 1 to 16 graders, got 17",
    ),
    (
        lambda: multi("", a=regex("x")),
        "grader.multi.calculate_output: must be set, got nothing",
    ),
    (
        lambda: multi("a + b", a=regex("x")),
        "grader.multi.calculate_output: must name graders of this one, which are a, got b",
    ),
    (lambda: multi("a.x", a=regex("x")), "grader.multi.calculate_output: must be numbers, names"),
    (lambda: multi("1", **{"A b": regex("x")}), "grader.multi.graders['A b']: must be called [a-z_]"),
    (lambda: multi("1", min=regex("x")), "grader.multi.graders['min']: must be called"),
    (lambda: multi("1", **{"\x1b": regex("x")}), "grader.multi.graders['\\x1b']: must be called"),
    (lambda: multi("a", a=Grader()), "grader.multi.graders['a']: must be one of string_check"),
    (
        lambda: multi("a", a=regex("[")),
        "grader.multi.graders['a'].regex.pattern: must be a regular expression",
    ),
    (
        lambda: deep(4),
        ".multi.graders['a'].multi.graders['a'].multi: multi graders must stand at most 3 deep",
    ),
    (wide, "must be one of at most 32 graders in all"),
    (
        lambda: Grader(remote=remote(range=ScoreRange(min=1, max=1)).remote),
        "grader.remote.range: min must be below max, got 1 and 1",
    ),
    (
        lambda: remote(range=ScoreRange(min=-1e7, max=1)),
        "grader.remote.range.min: must be in -1e+06..1e+06, got -10000000",
    ),
    (lambda: remote(range=ScoreRange(max=float("nan"))), "grader.remote.range.max: must be in"),
    (lambda: remote(""), "grader.remote.address: must be host:port, e.g. 127.0.0.1:50051, got nothing"),
    (lambda: remote("unix:///tmp/s"), "grader.remote.address: must be host:port"),
    (lambda: remote("dns://8.8.8.8/x:1"), "grader.remote.address: must be host:port"),
    (lambda: remote("http://localhost:1"), "grader.remote.address: must be host:port"),
    (lambda: remote("localhost"), "grader.remote.address: must be host:port"),
    (
        lambda: remote(timeout_seconds=601.0),
        "grader.remote.timeout_seconds: must be above 0 and at most 600, got 601",
    ),
    (lambda: remote(max_batch_size=257), "grader.remote.max_batch_size: must be in 1..256, got 257"),
    (lambda: reward_model(""), "grader.reward_model.model: must name a reward model, got nothing"),
]


@pytest.mark.parametrize(("made", "said"), WRONG, ids=[said[:70] for _, said in WRONG])
def test_wrong_graders_are_named(made: Callable[[], Grader], said: str) -> None:
    found = violations(made())
    assert len(found) == 1
    assert said in found[0]


def test_all_that_is_wrong_is_named_at_once() -> None:
    grader = multi("a + b", a=regex("["), b=string_check(text="{{x}}"))
    assert [one.partition(":")[0] for one in violations(grader)] == [
        "grader.multi.calculate_output",
        "grader.multi.graders['a'].regex.pattern",
        "grader.multi.graders['b'].string_check.input",
    ][1:]
