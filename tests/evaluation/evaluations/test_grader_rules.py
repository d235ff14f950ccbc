"""What graders of an evaluation may be: what cannot grade its records is refused by its field, before any is asked."""

from __future__ import annotations

import json

import pytest
from tests.evaluation.evaluations.conftest import Bench
from tests.evaluation.evaluations.memory_peers import BASE, TUNED

from luthier.errors import InvalidArgument, Reason
from luthier.evaluation.evaluations.grader_rules import RECORD_FIELDS, require_graders
from luthier.text.records import (
    ChatPair,
    ChatRecord,
    CompletionPair,
    CompletionRecord,
    Message,
    Record,
    record_to_json,
)
from luthier.v1.evaluation_pb2 import Evaluation, EvaluationArm
from luthier.v1.grader_pb2 import (
    Grader,
    GraderResult,
    MultiGrader,
    NumberMatchGrader,
    RegexGrader,
    RemoteGrader,
    RewardModelGrader,
)
from luthier.v1.verdict_pb2 import Guard, ScoreGuard

ARMS = [EvaluationArm(arm_id="zero", model=BASE), EvaluationArm(arm_id="tuned", model=TUNED)]
SHORT = RegexGrader(input="{{sample.output_text}}", pattern="^.{0,20}$")


def short(name: str = "short") -> Grader:
    return Grader(name=name, regex=SHORT)


def number(reference: str) -> Grader:
    right = NumberMatchGrader(input="{{sample.output_text}}", reference=reference)
    return Grader(
        name="both",
        multi=MultiGrader(graders={"right": Grader(number_match=right)}, calculate_output="right"),
    )


def remote(address: str) -> Grader:
    return Grader(name="far", remote=RemoteGrader(address=address))


async def test_a_verdict_and_guards_may_be_about_what_a_grader_that_is_there_gives(bench: Bench) -> None:
    graders = [short(), number("{{item.messages[-1].content}}"), remote("127.0.0.1:50051")]
    guard = Guard(score=ScoreGuard(score="grader.far"))
    made = await bench.create(arms=ARMS, graders=graders, primary_score="grader.short", guards=[guard])
    assert (made.primary_score, list(made.graders)) == ("grader.short", graders)
    _, spec = await bench.claim()
    assert list(spec.evaluate.evaluation.graders) == graders
    with pytest.raises(
        InvalidArgument, match=r"\(exact_match, perplexity, grader.short\), got 'grader.long'"
    ) as caught:
        await bench.create(arms=ARMS, graders=[short()], primary_score="grader.long")
    assert caught.value.violations[0].reason == Reason.METRIC_NOT_MEASURED


@pytest.mark.parametrize(
    ("graders", "fields", "reason", "words"),
    [
        ([short(""), short()], ["[0].name"], None, "1 to 63 lowercase letters"),
        ([short("Short one")], ["[0].name"], None, "1 to 63 lowercase letters.*got 'Short one'"),
        ([short(), short()], [""], None, "name must be unique, got 'short' 2 times"),
        ([short(name) for name in "abcdefghi"], [""], None, "must hold at most 8 graders, got 9"),
        ([Grader(name="none")], ["[0]"], None, "must be one of string_check, .*, got nothing"),
        (
            [Grader(name="bad", regex=RegexGrader(input="{{sample.output_text}}", pattern="("))],
            ["[0].regex.pattern"],
            None,
            "missing",
        ),
        (
            [Grader(name="deaf", regex=RegexGrader(input="{{item.prompt}}", pattern="x"))],
            ["[0]"],
            None,
            "must read the answer",
        ),
        (
            [number("{{item.answer}}")],
            ["[0].multi.graders['right'].number_match.reference"],
            Reason.TEMPLATE_FIELD_MISSING,
            "names {{item.answer}}, but no record has a field 'answer': records of a dataset version have messages, ",
        ),
        (
            [short(), remote("rewards.example.com:443")],
            ["[1].remote.address"],
            Reason.ADDRESS_NOT_ALLOWED,
            "must be host:port of 127.0.0.1, which LUTHIER_REWARD_ADDRESSES allows, got 'rewards.example.com:443'",
        ),
        (
            [short(), Grader(name="valued", reward_model=RewardModelGrader(model=BASE))],
            ["[1].reward_model.model"],
            Reason.REWARD_MODEL_EXPECTED,
            "must be a reward model .kind REWARD. or a checkpoint of one, got '.*/base'",
        ),
    ],
)
async def test_what_cannot_grade_is_refused_by_its_field(
    bench: Bench, graders: list[Grader], fields: list[str], reason: Reason | None, words: str
) -> None:
    with pytest.raises(InvalidArgument, match=words.replace("{{", r"\{\{")) as caught:
        await bench.create(arms=ARMS, graders=graders)
    assert [one.field for one in caught.value.violations] == [
        f"evaluation.graders{field}" for field in fields
    ]
    assert reason is None or [one.reason for one in caught.value.violations] == [reason]


def test_the_fields_of_records_are_those_that_records_are_written_with() -> None:
    turn = (Message(role="user", content="?"),)
    tools = ({"type": "function"},)
    written: list[Record] = [
        ChatRecord(messages=turn, tools=tools, label=True),
        CompletionRecord(prompt="a", completion="b", label=False),
        ChatPair(messages=turn, chosen=turn, rejected=turn, tools=tools),
        CompletionPair(prompt="a", chosen="b", rejected="c"),
    ]
    assert {name for one in written for name in json.loads(record_to_json(one))} == set(RECORD_FIELDS)


def test_results_of_other_graders_are_refused() -> None:
    evaluation = Evaluation(graders=[short("a"), short("b")])
    require_graders(evaluation, [GraderResult(name="a"), GraderResult(name="b")])
    with pytest.raises(InvalidArgument, match="must be of a, b, got b, a"):
        require_graders(evaluation, [GraderResult(name="b"), GraderResult(name="a")])
    with pytest.raises(InvalidArgument, match="must be of a, b, got none"):
        require_graders(evaluation, [])
