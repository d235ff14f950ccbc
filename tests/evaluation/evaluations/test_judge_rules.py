"""What judges may be: what is not said has its default, and what cannot be is refused by its field."""

from __future__ import annotations

from typing import Any

import pytest
from tests.evaluation.evaluations.conftest import Bench
from tests.evaluation.evaluations.memory_peers import BASE, OTHER, TUNED

from luthier.errors import InvalidArgument, NotFound, Reason
from luthier.evaluation.evaluations.judge_rules import require_judges
from luthier.v1.evaluation_pb2 import Evaluation, EvaluationArm
from luthier.v1.judge_pb2 import Judge, JudgeEndpoint, JudgeResult, PairwiseJudging, RubricJudging
from luthier.v1.verdict_pb2 import Guard, ScoreGuard

URL = "http://127.0.0.1:8000/v1"
ENDPOINT = JudgeEndpoint(url=URL, model="m")
ZERO, TUNED_ARM = EvaluationArm(arm_id="zero", model=BASE), EvaluationArm(arm_id="tuned", model=TUNED)


def judge(judge_id: str = "fair", **fields: Any) -> Judge:
    said = {"criteria": "is it right?", "pairwise": PairwiseJudging(), **fields}
    if "model" not in said:
        said.setdefault("endpoint", ENDPOINT)
    return Judge(judge_id=judge_id, **{name: value for name, value in said.items() if value is not None})


async def test_what_is_not_said_has_its_default(bench: Bench) -> None:
    judges = [
        judge("pairs", model=TUNED),
        judge("one-by-one", pairwise=None, rubric=RubricJudging()),
        judge("other", pairwise=PairwiseJudging(arm_id="zero"), model=OTHER),
    ]
    made = await bench.create(arms=[ZERO, TUNED_ARM], judges=judges, primary_score="judge.pairs")
    pairs, single, other = made.judges
    assert (pairs.pairwise.arm_id, pairs.max_new_tokens, pairs.base_model) == ("tuned", 512, BASE)
    assert (single.rubric.least, single.rubric.most, single.endpoint.timeout_seconds) == (1, 5, 60.0)
    assert (single.endpoint.max_calls, pairs.HasField("endpoint")) == (10_000, False)
    assert (other.pairwise.arm_id, other.base_model) == ("zero", OTHER)
    assert single.base_model == ""
    assert OTHER in made.model_digests, "it is kept from being deleted as arms' models are"
    _, spec = await bench.claim()
    assert spec.evaluate.evaluation.judges == made.judges
    assert [(one.arm.arm_id, one.base_model.name, one.adapter.name) for one in spec.evaluate.judges] == [
        ("pairs", BASE, TUNED),
        ("other", OTHER, ""),
    ]
    assert all(one.asking.template_date for one in spec.evaluate.judges)


async def test_without_a_tuned_arm_the_last_is_held_against_the_others(bench: Bench) -> None:
    arms = [ZERO, EvaluationArm(arm_id="few", model=BASE, num_shots=1)]
    made = await bench.create(arms=arms, judges=[judge()])
    assert made.judges[0].pairwise.arm_id == "few"


@pytest.mark.parametrize(
    ("judges", "field", "words"),
    [
        ([judge("Fair")], "[0].judge_id", "must be 1 to 63 lowercase letters|1 to 63 lowercase letters"),
        ([judge(), judge()], "", "judge_id must be unique, got 'fair' 2 times"),
        ([judge(str(n)) for n in "abcde"], "", "must hold at most 4 judges, got 5"),
        ([judge(criteria="")], "[0].criteria", "must be at most 4000 characters"),
        ([judge(criteria="x" * 4001)], "[0].criteria", "must be at most 4000 characters, got 4001"),
        ([judge(endpoint=None)], "[0]", "must be one of model and endpoint, got none"),
        ([judge(pairwise=None)], "[0]", "must be one of pairwise and rubric, got none"),
        ([judge(max_new_tokens=9000)], "[0].max_new_tokens", "must be in 1..8192, got 9000"),
        (
            [judge(pairwise=PairwiseJudging(arm_id="none"))],
            "[0].pairwise.arm_id",
            "must be one of the arms zero, tuned, got 'none'",
        ),
        (
            [judge(pairwise=None, rubric=RubricJudging(least=5, most=5))],
            "[0].rubric.most",
            "must be above least, got 5 and 5",
        ),
        ([judge(endpoint=JudgeEndpoint(url=URL))], "[0].endpoint.model", "must be at most 200 characters"),
        (
            [judge(endpoint=JudgeEndpoint(url="127.0.0.1:8000", model="m"))],
            "[0].endpoint.url",
            "must be http:// or https:// with host, port and path alone",
        ),
        (
            [judge(endpoint=JudgeEndpoint(url=URL, model="m", timeout_seconds=601))],
            "[0].endpoint.timeout_seconds",
            "must be above 0 and at most 600, got 601",
        ),
        (
            [judge(endpoint=JudgeEndpoint(url=URL, model="m", max_calls=-1))],
            "[0].endpoint.max_calls",
            "must be in 1..1000000, got -1",
        ),
    ],
)
async def test_what_cannot_be_is_refused(bench: Bench, judges: list[Judge], field: str, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words) as caught:
        await bench.create(arms=[ZERO, TUNED_ARM], judges=judges)
    assert [one.field for one in caught.value.violations] == [f"evaluation.judges{field}"]


async def test_more_judgements_than_calls_are_refused_with_the_number_that_is_needed(bench: Bench) -> None:
    """The split has three records, and there are three arms."""
    arms = [ZERO, EvaluationArm(arm_id="few", model=BASE, num_shots=1), TUNED_ARM]

    def of(max_calls: int, judge_id: str = "paid", **fields: Any) -> Judge:
        return judge(judge_id, endpoint=JudgeEndpoint(url=URL, model="m", max_calls=max_calls), **fields)

    rubric: dict[str, Any] = {"pairwise": None, "rubric": RubricJudging()}
    for each, manner in ((4, {}), (3, rubric)):
        got = 3 * each - 1
        words = (
            f"must be at least {3 * each}, a call for each judgement: {each} of each of 3 records; got {got}, "
            "for which evaluation.max_records must be at most 2"
        )
        with pytest.raises(InvalidArgument, match=words) as caught:
            await bench.create(arms=arms, judges=[judge("ours", model=TUNED), of(got, **manner)])
        assert [one.field for one in caught.value.violations] == ["evaluation.judges[1].endpoint.max_calls"]
    made = await bench.create(arms=arms, judges=[of(8), of(6, "scale", **rubric)], max_records=2)
    assert [one.endpoint.max_calls for one in made.judges] == [8, 6]


async def test_one_arm_alone_has_nothing_to_be_held_against(bench: Bench) -> None:
    with pytest.raises(
        InvalidArgument, match="must be unset where there are no two arms to compare, got zero"
    ):
        await bench.create(arms=[ZERO], judges=[judge()])
    rubric = judge(pairwise=None, rubric=RubricJudging())
    assert (await bench.create(arms=[ZERO], judges=[rubric])).judges


@pytest.mark.parametrize(
    ("endpoint", "field", "reason", "words"),
    [
        (
            JudgeEndpoint(url="https://judge.example.com/v1", model="m"),
            "url",
            Reason.ADDRESS_NOT_ALLOWED,
            "must be host:port of 127.0.0.1, which LUTHIER_JUDGE_ADDRESSES allows, got 'https://judge.example.com/v1'",
        ),
        (
            JudgeEndpoint(url=URL, model="m", key="HOME"),
            "key",
            Reason.KEY_NOT_ALLOWED,
            r"lets go to 127.0.0.1:8000 \(JUDGE_KEY\), got 'HOME'",
        ),
    ],
)
async def test_who_may_not_be_asked_is_refused(
    bench: Bench, endpoint: JudgeEndpoint, field: str, reason: Reason, words: str
) -> None:
    judges = [
        judge("allowed", endpoint=JudgeEndpoint(url=URL, model="m", key="JUDGE_KEY")),
        judge(endpoint=endpoint),
    ]
    with pytest.raises(InvalidArgument, match=words) as caught:
        await bench.create(arms=[ZERO, TUNED_ARM], judges=judges)
    (violation,) = caught.value.violations
    assert (violation.field, violation.reason) == (f"evaluation.judges[1].endpoint.{field}", reason)


async def test_a_model_that_judges_must_be_there_and_have_a_chat_template(bench: Bench) -> None:
    with pytest.raises(NotFound, match="does not exist"):
        await bench.create(arms=[ZERO, TUNED_ARM], judges=[judge(model=f"{BASE}-gone")])
    with pytest.raises(InvalidArgument) as caught:
        await bench.create(arms=[ZERO, TUNED_ARM], judges=[judge(model="m")])
    assert caught.value.violations[0].field == "evaluation.judges[0].model"
    bench.peers.templates = False
    with pytest.raises(InvalidArgument, match="must be a model with a chat template") as caught:
        await bench.create(arms=[ZERO, TUNED_ARM], judges=[judge(), judge("ours", model=OTHER)])
    (violation,) = caught.value.violations
    assert (violation.field, violation.reason) == ("evaluation.judges[1].model", Reason.CHAT_TEMPLATE_MISSING)


async def test_a_verdict_and_guards_may_be_about_what_a_judge_that_is_there_gives(bench: Bench) -> None:
    guard = Guard(score=ScoreGuard(score="judge.fair"))
    made = await bench.create(
        arms=[ZERO, TUNED_ARM], judges=[judge()], primary_score="judge.fair", guards=[guard]
    )
    assert made.primary_score == "judge.fair"
    wanted = r"\(exact_match, perplexity, judge.fair\), got 'judge.unfair'"
    with pytest.raises(InvalidArgument, match=wanted) as caught:
        await bench.create(arms=[ZERO, TUNED_ARM], judges=[judge()], primary_score="judge.unfair")
    assert caught.value.violations[0].reason == Reason.METRIC_NOT_MEASURED


def test_results_of_other_judges_are_refused() -> None:
    evaluation = Evaluation(judges=[judge("a"), judge("b")])
    require_judges(evaluation, [JudgeResult(judge_id="a"), JudgeResult(judge_id="b")])
    with pytest.raises(InvalidArgument, match="must be of a, b, got b, a"):
        require_judges(evaluation, [JudgeResult(judge_id="b"), JudgeResult(judge_id="a")])
    with pytest.raises(InvalidArgument, match="must be of a, b, got none"):
        require_judges(evaluation, [])
