"""`luthier evaluations compare`, `diff`, `export`, and how `create` asks for a verdict, against fake services."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from click.testing import Result

from luthier.v1.evaluation_pb2 import (
    CORRECTNESS_RIGHT,
    CORRECTNESS_WRONG,
    FINISH_REASON_STOP,
    SCORE_DIRECTION_LOWER_IS_BETTER,
    SCORE_KIND_BINARY,
    VERDICT_BETTER,
    VERDICT_INCONCLUSIVE,
    ArmResult,
    Comparison,
    Evaluation,
    EvaluationArm,
    Prediction,
    ScoreEstimate,
)
from luthier.v1.evaluation_service_pb2 import ListPredictionsResponse
from luthier.v1.judge_pb2 import JUDGE_PREFERENCE_FIRST, JUDGE_PREFERENCE_SECOND, JUDGE_PREFERENCE_TIE
from luthier.v1.verdict_pb2 import EvaluationVerdict, Guard, GuardResult, ScoreGuard

Run = Callable[..., Result]
NAME = "projects/default/evaluations/e"
SENTENCE = (
    "Fine-tuning wins: tuned is better than base-3 on exact_match: +50.0 pp [+30.0, +70.0] on 48 records."
)


def evaluation() -> Evaluation:
    made = Evaluation(
        name=NAME,
        state=Evaluation.STATE_SUCCEEDED,
        arms=[EvaluationArm(arm_id=arm) for arm in ("base-0", "base-3", "tuned")],
        verdict=EvaluationVerdict(
            outcome=EvaluationVerdict.OUTCOME_FINE_TUNE_WINS,
            sentence=SENTENCE,
            candidate_arm_id="tuned",
            rival_arm_id="base-3",
            score="exact_match",
            guards=[
                GuardResult(
                    guard=Guard(score=ScoreGuard(score="exact_match")),
                    standing=GuardResult.STANDING_HELD,
                    sentence="tuned loses at most 0.0 pp",
                )
            ],
        ),
    )
    for arm in made.arms:
        scores = [
            ScoreEstimate(score="exact_match", kind=SCORE_KIND_BINARY),
            ScoreEstimate(score="perplexity", direction=SCORE_DIRECTION_LOWER_IS_BETTER),
        ]
        made.arm_results.append(ArmResult(arm_id=arm.arm_id, scores=scores))
    for score, adjusted in (("exact_match", None), ("perplexity", 0.21)):
        made.comparisons.append(
            Comparison(
                candidate_arm_id="tuned",
                baseline_arm_id="base-3",
                score=score,
                difference=0.5,
                lower=0.3 if adjusted is None else -0.1,
                upper=0.7,
                p_value=0.03,
                adjusted_p_value=adjusted,
                confidence=0.95 if adjusted is None else 0.9929,
                count=48,
                verdict=VERDICT_BETTER if adjusted is None else VERDICT_INCONCLUSIVE,
                kind=SCORE_KIND_BINARY,
            )
        )
    return made


def prediction(row: int, *, base: bool, tuned: bool, failed: bool = False) -> Prediction:
    made = Prediction(row=row, record_id=f"{row}", reference="red", filename="test.jsonl", line=row + 1)
    made.prompt.add(role="user", content=f"question {row}")
    for arm_id, right in (("base-3", base), ("tuned", tuned)):
        answer = made.answers.add(
            arm_id=arm_id,
            text=f"{arm_id} on {row}",
            finish_reason=FINISH_REASON_STOP,
            scores={"exact_match": float(right), "perplexity": 2.0 + right},
            correctness=CORRECTNESS_RIGHT if right else CORRECTNESS_WRONG,
        )
        if failed and arm_id == "tuned":
            answer.error.message = "too long"
    return made


@pytest.fixture
def answers(services: Any) -> None:
    found = [
        prediction(0, base=True, tuned=True),
        prediction(1, base=False, tuned=True),
        prediction(2, base=True, tuned=False),
        prediction(3, base=True, tuned=False, failed=True),
    ]
    services.answers["GetEvaluation"] = lambda request, context: evaluation()
    services.answers["ListPredictions"] = lambda request, context: ListPredictionsResponse(predictions=found)


def test_the_verdict_is_what_show_and_compare_say_first(answers: None, run: Run) -> None:
    for command in ("show", "compare"):
        lines = run("evaluations", command, "e").stdout.splitlines()
        assert lines[0].strip() == SENTENCE
        assert lines[1].strip() == "guard held: tuned loses at most 0.0 pp"


def test_a_row_shows_the_p_value_and_the_interval_that_its_verdict_follows_from(
    answers: None, run: Run
) -> None:
    output = run("evaluations", "compare", "e").stdout
    assert re.search(r"exact_match +tuned - base-3 +\+50\.0 pp \[.*\] +95 % +0\.03 +48 +better", output)
    assert re.search(r"perplexity +tuned - base-3 +.* +99\.29 % +0\.21 +48 +inconclusive", output)
    output = run("evaluations", "compare", "e", "--score", "perplexity").stdout
    assert "95 %" not in output
    refused = run("evaluations", "compare", "e", "--score", "bleu")
    assert refused.exit_code == 2
    assert "must be one of exact_match, perplexity, got 'bleu'" in refused.output


def test_pairs_that_were_lost_are_shown_with_those_that_count(services: Any, run: Run) -> None:
    found = evaluation()
    found.comparisons[0].num_lost_baseline, found.comparisons[0].num_lost_both = 7, 1
    found.warnings.append("tuned and base-3 have 48 of 56 records in common")
    services.answers["GetEvaluation"] = lambda request, context: found
    output = run("evaluations", "compare", "e").stdout
    assert re.search(r"exact_match +tuned - base-3 .* 48 of 56 +better", output)
    assert re.search(r"perplexity +tuned - base-3 .* 48 +inconclusive", output)
    assert (
        "warning: tuned and base-3 have 48 of 56 records in common" in run("evaluations", "show", "e").stdout
    )


def test_show_scores_apart_what_was_learnt_from(services: Any, run: Run) -> None:
    found = evaluation()
    for apart, value in ((found.contamination.clean, 0.25), (found.contamination.contaminated, 1.0)):
        for arm in found.arms:
            score = ScoreEstimate(score="exact_match", value=value, kind=SCORE_KIND_BINARY)
            apart.add(arm_id=arm.arm_id, scores=[score])
    services.answers["GetEvaluation"] = lambda request, context: found
    output = run("evaluations", "show", "e").stdout
    assert re.search(r"exact_match, records not learnt from +25\.0 % .* 25\.0 %", output)
    assert re.search(r"exact_match, records learnt from +100\.0 % ", output)


def test_diff_shows_where_the_arms_of_the_verdict_disagree(answers: None, run: Run) -> None:
    output = run("evaluations", "diff", "e").stdout
    assert re.findall(r"^ *(\d) +question +(\w+)", output, re.MULTILINE) == [("1", "gained"), ("2", "lost")]
    output = run("evaluations", "diff", "e", "--only", "lost").stdout
    assert re.findall(r"^ *(\d) +question +(\w+)", output, re.MULTILINE) == [("2", "lost")]
    output = run("evaluations", "diff", "e", "base-3", "tuned", "--limit", "1").stdout
    assert re.findall(r"^ *(\d) +question +(\w+)", output, re.MULTILINE) == [("1", "lost")]
    output = run("evaluations", "diff", "e", "--score", "perplexity").stdout
    assert re.findall(r"^ *(\d) +question +(\w+)", output, re.MULTILINE) == [("1", "lost"), ("2", "gained")]


def test_diff_of_free_text_is_by_the_score_of_the_verdict(services: Any, run: Run) -> None:
    found = evaluation()
    found.verdict.score = "perplexity"
    predictions = [prediction(row, base=False, tuned=False) for row in range(3)]
    for one, (few, tuned) in zip(predictions, ((3.0, 2.0), (3.0, 3.0), (2.0, 2.5)), strict=True):
        for answer, value in zip(one.answers, (few, tuned), strict=True):
            answer.scores["perplexity"] = value
    services.answers["GetEvaluation"] = lambda request, context: found
    services.answers["ListPredictions"] = lambda request, context: ListPredictionsResponse(
        predictions=predictions
    )
    output = run("evaluations", "diff", "e").stdout
    assert re.findall(r"^ *(\d) +question +(\w+)", output, re.MULTILINE) == [("0", "gained"), ("2", "lost")]
    nothing = run("evaluations", "diff", "e", "--score", "exact_match")
    assert nothing.stdout == ""
    assert "tuned and base-3 disagree on no record (exact_match)" in nothing.stderr


def test_diff_by_a_judge_of_pairs_is_by_what_it_said_of_these_two(services: Any, run: Run) -> None:
    found = evaluation()
    found.verdict.score = "judge.j"
    for result in found.arm_results:
        result.scores.add(score="judge.j")
    sides = {
        0: (JUDGE_PREFERENCE_FIRST, JUDGE_PREFERENCE_SECOND),
        1: (JUDGE_PREFERENCE_FIRST, JUDGE_PREFERENCE_FIRST),
        2: (JUDGE_PREFERENCE_TIE, JUDGE_PREFERENCE_FIRST),
    }
    predictions = [prediction(row, base=False, tuned=False) for row in sides]
    for one in predictions:
        for answer in one.answers:
            answer.scores["judge.j"] = 0.5  # over all rivals
        pairs = (("tuned", "base-3"), ("base-3", "tuned"))
        for (arm, rival), preference in zip(pairs, sides[one.row], strict=True):
            one.judgements.add(judge_id="j", arm_id=arm, rival_arm_id=rival, preference=preference)
    services.answers["GetEvaluation"] = lambda request, context: found
    services.answers["ListPredictions"] = lambda request, context: ListPredictionsResponse(
        predictions=predictions
    )
    output = run("evaluations", "diff", "e").stdout
    assert re.findall(r"^ *(\d) +question +(\w+)", output, re.MULTILINE) == [("0", "gained"), ("2", "lost")]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("tuned",), "give both CANDIDATE and BASELINE, or neither, got the arm 'tuned' alone"),
        (("tuned", "base-3", "base-0"), "give two arms at most, got 3: tuned base-3 base-0"),
        (("tuned", "none"), "the arm must be one of base-0, base-3, tuned, got 'none'"),
        (("tuned", "tuned"), "two different arms must be given"),
        (("--score", "bleu"), "the score must be one of exact_match, perplexity, got 'bleu'"),
    ],
)
def test_diff_refuses_what_is_not_there(answers: None, run: Run, words: tuple[str, ...], said: str) -> None:
    refused = run("evaluations", "diff", "e", *words)
    assert refused.exit_code == 2
    assert said in refused.output


def test_export_writes_a_row_for_each_record_and_arm(answers: None, run: Run, tmp_path: Path) -> None:
    lines, table = tmp_path / "answers.jsonl", tmp_path / "answers.parquet"
    assert run("evaluations", "export", "e", "--output", str(lines)).stdout == f"{lines}\n"
    assert run("evaluations", "export", "e", "--output", str(table)).exit_code == 0
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [(row["row"], row["arm_id"], row["right"], row["error"]) for row in rows[:2]] == [
        (0, "base-3", True, None),
        (0, "tuned", True, None),
    ]
    assert rows[7]["error"] == "too long"
    assert rows[0]["prompt"] == [{"role": "user", "content": "question 0"}]
    stored = pq.read_table(table).to_pylist()
    assert [{**row, "scores": dict(row["scores"])} for row in stored] == [
        {name: row[name] for name in stored[0]} for row in rows
    ]
    refused = run("evaluations", "export", "e", "--output", str(tmp_path / "answers.csv"))
    assert refused.exit_code == 2
    assert "must end with .jsonl or .parquet, got 'answers.csv'" in refused.output


def test_diff_writes_what_it_found_to_a_file(answers: None, run: Run, tmp_path: Path) -> None:
    output = tmp_path / "lost.jsonl"
    assert run("evaluations", "diff", "e", "--only", "lost", "--output", str(output)).exit_code == 0
    assert {json.loads(line)["row"] for line in output.read_text().splitlines()} == {2}


def test_create_says_what_the_verdict_is_to_be_about(services: Any, run: Run) -> None:
    seen: list[Evaluation] = []

    def create(request: Any, context: Any) -> Evaluation:
        seen.append(request.evaluation)
        return Evaluation(name=NAME)

    services.answers["CreateEvaluation"] = create
    wanted = ("--primary-score", "exact_match", "--smallest-difference", "0.02", "--candidate", "tuned")
    guards = ("--guard", "field_match.parsed=0.01", "--guard", "perplexity=0.5:base-3")
    result = run("evaluations", "create", "--version", "d/v", "--arm", "tuned=t", *wanted, *guards)
    assert result.exit_code == 0, result.output
    (made,) = seen
    assert (made.primary_score, made.smallest_difference, made.candidate_arm_id) == (
        "exact_match",
        0.02,
        "tuned",
    )
    assert [(one.score.score, one.score.max_loss, one.score.baseline_arm_id) for one in made.guards] == [
        ("field_match.parsed", 0.01, ""),
        ("perplexity", 0.5, "base-3"),
    ]
    refused = run("evaluations", "create", "--version", "d/v", "--arm", "tuned=t", "--guard", "parsed")
    assert refused.exit_code == 2
    assert "must be SCORE=LOSS, SCORE=LOSS:ARM or drift=LEAST, got 'parsed'" in refused.output
