"""`luthier evaluations diff A B`: where arms of two evaluations disagree, against fake services."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from luthier.v1.dataset_pb2 import SPLIT_TEST, SPLIT_VALIDATION
from luthier.v1.evaluation_pb2 import (
    SCORE_DIRECTION_LOWER_IS_BETTER,
    SCORE_KIND_FRACTION,
    ArmResult,
    Evaluation,
    EvaluationArm,
    Prediction,
    ScoreEstimate,
)
from luthier.v1.evaluation_service_pb2 import ListPredictionsResponse
from luthier.v1.grader_pb2 import RemoteGrader
from luthier.v1.judge_pb2 import JudgeEndpoint
from luthier.v1.verdict_pb2 import EvaluationVerdict

Run = Callable[..., Result]
PARENT = "projects/default/evaluations"


def evaluation(name: str, *arms: str, score: str = "chrf", **fields: Any) -> Evaluation:
    made = Evaluation(
        name=f"{PARENT}/{name}",
        state=Evaluation.STATE_SUCCEEDED,
        dataset_version="projects/default/datasets/d/versions/v1",
        dataset_digest="ab" * 32,
        split=SPLIT_TEST,
        arms=[EvaluationArm(arm_id=arm) for arm in arms],
        verdict=EvaluationVerdict(score=score, candidate_arm_id=arms[-1], rival_arm_id=arms[0]),
    )
    for field, value in fields.items():
        setattr(made, field, value)
    for arm in arms:
        scores = [
            ScoreEstimate(score=score, kind=SCORE_KIND_FRACTION),
            ScoreEstimate(score="perplexity", direction=SCORE_DIRECTION_LOWER_IS_BETTER),
        ]
        made.arm_results.append(ArmResult(arm_id=arm, scores=scores))
    return made


def prediction(row: int, record: str, **chrf: float) -> Prediction:
    made = Prediction(row=row, record_id=record, reference="red", filename="test.jsonl", line=row + 1)
    made.prompt.add(role="user", content=f"question {record}")
    for arm, value in chrf.items():
        made.answers.add(arm_id=arm, text=f"{arm} {value}", scores={"chrf": value, "perplexity": 1 + value})
    return made


@pytest.fixture
def two(services: Any) -> dict[str, Evaluation]:
    """`new` asked records a, b, b again, c and d; `old` asked d, b, b again, a and e."""
    known = {"new": evaluation("new", "base", "tuned"), "old": evaluation("old", "base", "tuned", "more")}
    answers = {
        "new": [
            prediction(0, "a", base=0.1, tuned=0.9),
            prediction(1, "b", base=0.1, tuned=0.5),
            prediction(2, "b", base=0.1, tuned=0.2),
            prediction(3, "c", base=0.1, tuned=0.9),
            prediction(4, "d", base=0.1, tuned=0.4),
        ],
        "old": [
            prediction(0, "d", base=0.1, tuned=0.5, more=0.4),
            prediction(1, "b", base=0.1, tuned=0.5, more=0.5),
            prediction(2, "b", base=0.1, tuned=0.3, more=0.1),
            prediction(3, "a", base=0.1, tuned=0.6, more=0.9),
            prediction(4, "e", base=0.1, tuned=0.6, more=0.9),
        ],
    }

    def named(name: str) -> str:
        return name.removeprefix(f"{PARENT}/")

    services.answers["GetEvaluation"] = lambda request, context: known[named(request.name)]
    services.answers["ListPredictions"] = lambda request, context: ListPredictionsResponse(
        predictions=answers[named(request.parent)]
    )
    return known


def shown(output: str) -> list[tuple[str, ...]]:
    return re.findall(r"^ *(\d) +question +(\w+)", output, re.MULTILINE)


def test_arms_of_two_evaluations_are_compared_on_the_records_that_both_asked(two: Any, run: Run) -> None:
    output = run("evaluations", "diff", "new:tuned", "old:tuned").stdout
    assert shown(output) == [("0", "gained"), ("2", "lost"), ("4", "lost")]
    assert "new:tuned" in output
    assert "old:tuned" in output
    output = run("evaluations", "diff", "new", "old").stdout
    assert shown(output) == [("2", "gained")], "by default the arms that the verdicts judged"
    output = run("evaluations", "diff", "new:tuned", "old:tuned", "--only", "gained").stdout
    assert shown(output) == [("0", "gained")]
    output = run("evaluations", "diff", "new:tuned", "old:tuned", "--score", "perplexity").stdout
    assert shown(output) == [("0", "lost"), ("2", "gained"), ("4", "gained")]
    nothing = run("evaluations", "diff", "new:base", "old:base")
    assert "new:base and old:base disagree on no record (chrf)" in nothing.stderr


def test_what_was_found_is_written_to_a_file_with_both_answers(two: Any, run: Run, tmp_path: Path) -> None:
    output = tmp_path / "lost.jsonl"
    words = ("--only", "lost", "--output", str(output))
    assert run("evaluations", "diff", "new:tuned", "old:tuned", *words).exit_code == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["row"], row["arm_id"], row["text"]) for row in rows] == [
        (2, "old:tuned", "tuned 0.3"),
        (2, "new:tuned", "tuned 0.2"),
        (4, "old:tuned", "tuned 0.5"),
        (4, "new:tuned", "tuned 0.4"),
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dataset_version": "projects/default/datasets/d/versions/v2"}, "old on TEST of d/v2"),
        ({"dataset_digest": "cd" * 32}, "old on TEST of d/v1 (cdcdcdcdcdcd)"),
        ({"split": SPLIT_VALIDATION}, "old on VALIDATION of d/v1"),
    ],
)
def test_evaluations_of_other_records_are_refused(
    two: dict[str, Evaluation], run: Run, changes: dict[str, Any], said: str
) -> None:
    for field, value in changes.items():
        setattr(two["old"], field, value)
    refused = run("evaluations", "diff", "new", "old")
    assert refused.exit_code == 2
    words = " ".join(refused.output.split())
    assert (
        "must have asked records of the same split of the same dataset version, got new on TEST of d/v1"
        in words
    )
    assert said in words


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("new", "old:none"), "the arm must be one of base, tuned, more of old, got 'none'"),
        (("new:none", "old"), "the arm must be one of base, tuned of new, got 'none'"),
        (("new", "new:base"), "two different evaluations must be given, got new twice"),
        (("new", "old", "--score", "bleu"), "one that both have, chrf, perplexity, got 'bleu'"),
        (("new", "tuned"), "got the arm 'tuned' alone"),
    ],
)
def test_what_is_not_there_is_refused(two: Any, run: Run, words: tuple[str, ...], said: str) -> None:
    refused = run("evaluations", "diff", *words)
    assert refused.exit_code == 2
    assert said in " ".join(refused.output.split())


def test_without_a_score_in_common_whether_the_whole_answer_is_right_tells(two: Any, run: Run) -> None:
    two["new"].verdict.score = "judge.j"
    nothing = run("evaluations", "diff", "new:tuned", "old:tuned")
    assert shown(nothing.stdout) == [("0", "differs"), ("2", "differs"), ("4", "differs")]


PAIRS = (
    "a judge of pairs says how an arm stands to the other arms of its evaluation, not how good its answer is"
)


def judged(two: dict[str, Evaluation], score: str = "judge.j") -> None:
    """Let both evaluations have a score that somebody gave, the one of their verdicts."""
    for made in two.values():
        made.verdict.score = score
        for result in made.arm_results:
            result.scores.add(score=score, kind=SCORE_KIND_FRACTION)


def refused(run: Run, score: str) -> str:
    found = run("evaluations", "diff", "new:tuned", "old:tuned", "--score", score)
    assert found.exit_code == 2
    return " ".join(found.output.split())


def test_a_judge_of_pairs_says_nothing_of_arms_of_another_evaluation(
    two: dict[str, Evaluation], run: Run
) -> None:
    judged(two)
    for made in two.values():
        made.judges.add(judge_id="j", criteria="good").pairwise.arm_id = "tuned"
    found = run("evaluations", "diff", "new:tuned", "old:tuned")
    assert shown(found.stdout) == [("0", "differs"), ("2", "differs"), ("4", "differs")]
    assert f"whether the whole answer is right tells, not the score of the verdict: {PAIRS}" in " ".join(
        found.stderr.split()
    )
    assert f"one that both have, chrf, perplexity, got 'judge.j': {PAIRS}" in refused(run, "judge.j")
    assert run("evaluations", "diff", "new:tuned", "old:tuned", "--score", "chrf").stderr == ""


@pytest.mark.parametrize(
    ("score", "kind", "change"),
    [
        ("judge.j", "judge", lambda made: setattr(made.judges[0], "criteria", "short")),
        ("judge.j", "judge", lambda made: setattr(made.judges[0].rubric, "most", 10)),
        ("judge.j", "judge", lambda made: made.model_digests.update(base="other")),
        ("judge.j", "judge", lambda made: made.judges.pop()),
        (
            "grader.g",
            "grader",
            lambda made: setattr(made.graders[0].multi.graders["a"].remote, "address", "b:1"),
        ),
        ("grader.g", "grader", lambda made: made.model_digests.update(values="other")),
        ("reward", "reward model", lambda made: setattr(made, "reward_model", "other")),
        ("reward", "reward model", lambda made: made.model_digests.update(values="other")),
    ],
)
def test_a_score_that_others_gave_is_none_that_both_have(
    two: dict[str, Evaluation], run: Run, score: str, kind: str, change: Callable[[Evaluation], object]
) -> None:
    judged(two, score)
    for number, made in enumerate(two.values(), start=1):
        judge = made.judges.add(judge_id="j", criteria="good", model="judging", base_model="base")
        judge.rubric.most = 5
        parts = made.graders.add(name="g").multi.graders
        # How long it may take, and how many it is sent at once, is no part of what it says.
        parts["a"].remote.MergeFrom(
            RemoteGrader(address="a:1", timeout_seconds=number, max_batch_size=number)
        )
        parts["b"].reward_model.model = "values"
        made.reward_model = "values"
        made.model_digests.update(judging="d1", base="d2", values="d3")
    assert run("evaluations", "diff", "new:tuned", "old:tuned", "--score", score).exit_code == 0
    change(two["old"])
    assert f"got '{score}': its {kind} is not the same in both" in refused(run, score)


def test_an_endpoint_is_the_same_judge_whatever_it_may_take(two: dict[str, Evaluation], run: Run) -> None:
    judged(two)
    for number, made in enumerate(two.values(), start=1):
        judge = made.judges.add(judge_id="j", criteria="good")
        judge.endpoint.MergeFrom(
            JudgeEndpoint(
                url="http://a", model="m", key=f"K{number}", timeout_seconds=number, max_calls=number
            )
        )
    assert run("evaluations", "diff", "new:tuned", "old:tuned", "--score", "judge.j").exit_code == 0
    two["old"].judges[0].endpoint.model = "n"
    assert "its judge is not the same in both" in refused(run, "judge.j")
