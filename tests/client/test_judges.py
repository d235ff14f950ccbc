"""Judges in words, on a terminal and in the report, and from files on the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from click.testing import Result
from google.rpc import status_pb2
from rich.console import Console

from luthier.client.cli.evaluation_views import evaluation_facts, prediction_table
from luthier.client.judges import (
    agreement_words,
    bias_words,
    cost_words,
    error_words,
    judgement_words,
    pair_words,
)
from luthier.client.report import ReportData, render_report
from luthier.v1.evaluation_pb2 import Evaluation, EvaluationArm, Prediction
from luthier.v1.judge_pb2 import (
    JUDGE_PREFERENCE_FIRST,
    JUDGE_PREFERENCE_SECOND,
    JUDGE_PREFERENCE_TIE,
    JudgedPair,
    JudgeErrors,
    JudgeEstimate,
    Judgement,
    JudgeResult,
)

PARENT = "projects/default"
YAML = """
judge_id: helpful
criteria: Does it help?
endpoint: {url: "http://127.0.0.1:8000/v1", model: m, key: MY_KEY}
pairwise: {}
"""


def judged() -> JudgeResult:
    return JudgeResult(
        judge_id="helpful",
        num_asked=96,
        num_errors=3,
        errors=[
            JudgeErrors(reason="JUDGE_ANSWER_INVALID", count=2, first_message="what?"),
            JudgeErrors(reason="JUDGE_UNAVAILABLE", count=1, first_message="away"),
        ],
        num_repeated_calls=41,
        num_calls=1137,
        num_prompt_tokens=40312,
        num_generated_tokens=3120,
        agreement=JudgeEstimate(value=0.75, lower=0.6, upper=0.86, count=45),
        position_bias=JudgeEstimate(value=0.1, lower=-0.02, upper=0.22, count=45),
        pairs=[
            JudgedPair(
                arm_id="tuned",
                rival_arm_id="zero",
                num_wins=30,
                num_ties=9,
                num_losses=6,
                num_contradictions=4,
                num_errors=3,
            )
        ],
    )


def evaluation() -> Evaluation:
    return Evaluation(
        name=f"{PARENT}/evaluations/e",
        arms=[EvaluationArm(arm_id="zero", model="b"), EvaluationArm(arm_id="tuned", model="t")],
        judge_results=[judged(), JudgeResult(judge_id="scale", num_asked=96)],
    )


def test_words_say_what_was_lost_and_what_the_order_does() -> None:
    found = judged()
    assert error_words(found) == "3 of 96: 2 JUDGE_ANSWER_INVALID, 1 JUDGE_UNAVAILABLE"
    assert agreement_words(found) == "75.0 % [60.0, 86.0] of 45, 11.1 % of the pairs ties"
    assert bias_words(found) == "+10.0 pp [-2.0, +22.0]"
    assert pair_words(found.pairs[0]) == (
        "tuned against zero: 30 wins, 9 ties (4 contradictions), 6 losses, 3 not judged"
    )
    single = JudgeResult(judge_id="scale", num_asked=96)
    assert (error_words(single), agreement_words(single), bias_words(single)) == ("0 of 96", "", "")
    assert cost_words(found) == "1,137 calls (41 repeated), 40,312 tokens read, 3,120 written"
    assert cost_words(single) == ""
    assert cost_words(JudgeResult(num_calls=8)) == "8 calls"
    assert cost_words(JudgeResult(num_prompt_tokens=9, num_generated_tokens=1)) == "9 tokens read, 1 written"


def test_words_of_one_judgement_say_in_which_order_it_was_shown() -> None:
    pair: dict[str, Any] = {"judge_id": "j", "arm_id": "zero", "rival_arm_id": "tuned"}
    assert (
        judgement_words(Judgement(**pair, preference=JUDGE_PREFERENCE_FIRST))
        == "zero, then tuned: zero is better"
    )
    assert (
        judgement_words(Judgement(**pair, preference=JUDGE_PREFERENCE_SECOND))
        == "zero, then tuned: tuned is better"
    )
    assert judgement_words(Judgement(**pair, preference=JUDGE_PREFERENCE_TIE)) == "zero, then tuned: tie"
    assert judgement_words(Judgement(judge_id="j", arm_id="zero", number=4)) == "zero: 4"
    lost = Judgement(**pair, error=status_pb2.Status(message="away"))
    assert judgement_words(lost) == "zero, then tuned: away"


def test_a_terminal_shows_judges_pairs_and_judgements() -> None:
    console = Console(width=200)
    row = Prediction(judgements=[Judgement(judge_id="scale", arm_id="zero", number=4)])
    with console.capture() as capture:
        console.print(evaluation_facts(evaluation()))
        console.print(prediction_table([row]))
    shown = capture.get()
    for words in (
        "3 of 96: 2 JUDGE_ANSWER_INVALID, 1 JUDGE_UNAVAILABLE",
        "75.0 % [60.0, 86.0] of 45",
        "+10.0 pp [-2.0, +22.0]",
        "1,137 calls (41 repeated), 40,312 tokens read",
        "judge helpful: tuned against zero: 30 wins",
        "zero: 4",
    ):
        assert words in shown, shown


def test_a_report_has_judges_only_where_there_are_some() -> None:
    found = evaluation()
    page = render_report(ReportData(evaluation=found))
    for words in (
        "<h2>Judges</h2>",
        "75.0 % [60.0, 86.0] of 45",
        "30 wins, 9 ties (4 contradictions)",
        "1,137 calls (41 repeated), 40,312 tokens read, 3,120 written",
    ):
        assert words in page
    row = Prediction(judgements=[Judgement(judge_id="<j>", arm_id="zero", number=4)])
    assert "<li>judge &lt;j&gt;: zero: 4</li>" in render_report(
        ReportData(evaluation=found, predictions=[row])
    )
    del found.judge_results[:]
    assert "<h2>Judges</h2>" not in render_report(ReportData(evaluation=found))


def test_files_say_judges(services: Any, run: Callable[..., Result], tmp_path: Path) -> None:
    asked: list[Evaluation] = []

    def create(request: Any, context: Any) -> Evaluation:
        asked.append(request.evaluation)
        return evaluation()

    services.answers["CreateEvaluation"] = create
    endpoint, ours, wrong = (tmp_path / name for name in ("a.yaml", "b.json", "c.yaml"))
    endpoint.write_text(YAML)
    ours.write_text('{"judge_id": "ours", "model": "smollm2", "criteria": "c", "rubric": {"most": 3}}')
    wrong.write_text("judge_id: helpful\ncriterion: typo\n")
    command = ["evaluations", "create", "--version", "d/v", "--arm", "zero=b", "--arm", "tuned=t"]
    result = run(*command, "--judge", str(endpoint), "--judge", str(ours))
    assert result.exit_code == 0, result.output
    first, second = asked[0].judges
    assert (first.judge_id, first.endpoint.key, first.WhichOneof("manner")) == (
        "helpful",
        "MY_KEY",
        "pairwise",
    )
    assert (second.model, second.rubric.most) == (f"{PARENT}/models/smollm2", 3)
    refused = run(*command, "--judge", str(wrong))
    assert refused.exit_code == 2
    assert "c.yaml:2" in refused.output
    assert "criterion" in refused.output
