"""Grades of an evaluation in words, on a terminal and in the report, and graders from files on the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from click.testing import Result
from google.rpc import status_pb2
from rich.console import Console

from luthier.client.cli.evaluation_views import evaluation_facts, prediction_table
from luthier.client.graders import first_error, grade_words, lost_words
from luthier.client.report import ReportData, render_report
from luthier.v1.evaluation_pb2 import ArmPrediction, Evaluation, EvaluationArm, Prediction
from luthier.v1.grader_pb2 import GraderErrors, GraderResult, SampleGrade

YAML = """
name: short
regex: {input: "{{sample.output_text}}", pattern: "^.{0,20}$"}
"""
LOST = GraderResult(
    name="far",
    num_graded=96,
    num_errors=3,
    errors=[
        GraderErrors(reason="REWARD_FAILED", count=2, first_message="it is <odd>"),
        GraderErrors(reason="GRADER_INPUT_INVALID", count=1, first_message="what?"),
    ],
)
WHOLE = GraderResult(name="short", num_graded=96)
GRADES = {
    "short": SampleGrade(score=0.623456, part_scores={"b": 0.25, "a": 1}),
    "far": SampleGrade(error=status_pb2.Status(message="it is <odd>"), part_scores={"a": 1}),
}


def evaluation() -> Evaluation:
    return Evaluation(
        name="projects/default/evaluations/e",
        arms=[EvaluationArm(arm_id="zero", model="b"), EvaluationArm(arm_id="tuned", model="t")],
        grader_results=[LOST, WHOLE],
    )


def row() -> Prediction:
    return Prediction(answers=[ArmPrediction(arm_id="zero", text="so", grades=GRADES)])


def test_words_say_what_has_no_score_and_why() -> None:
    assert lost_words(LOST) == "3 of 96: 2 REWARD_FAILED, 1 GRADER_INPUT_INVALID"
    assert (lost_words(WHOLE), first_error(WHOLE)) == ("0 of 96", "")
    assert first_error(LOST) == "it is <odd>"
    assert grade_words(GRADES["short"]) == "0.6235 (a 1, b 0.25)"
    assert grade_words(GRADES["far"]) == "no score, it is <odd> (a 1)"
    assert grade_words(SampleGrade(score=0)) == "0"


def test_a_terminal_shows_graders_and_grades() -> None:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(evaluation_facts(evaluation()))
        console.print(prediction_table([row()]))
    shown = capture.get()
    for words in (
        "3 of 96: 2 REWARD_FAILED, 1 GRADER_INPUT_INVALID",
        "0 of 96",
        "grader short",
        "0.6235 (a 1, b 0.25)",
        "no score, it is <odd> (a 1)",
    ):
        assert words in shown, shown


def test_a_report_has_graders_only_where_there_are_some() -> None:
    found = evaluation()
    page = render_report(ReportData(evaluation=found, predictions=[row()]))
    for words in (
        "<h2>Graders</h2>",
        "3 of 96: 2 REWARD_FAILED, 1 GRADER_INPUT_INVALID",
        "it is &lt;odd&gt;",
        "<li>grader far: no score, it is &lt;odd&gt; (a 1)</li>",
        "<li>grader short: 0.6235 (a 1, b 0.25)</li>",
    ):
        assert words in page
    del found.grader_results[:]
    assert "<h2>Graders</h2>" not in render_report(ReportData(evaluation=found))


def test_files_say_graders(services: Any, run: Callable[..., Result], tmp_path: Path) -> None:
    asked: list[Evaluation] = []

    def create(request: Any, context: Any) -> Evaluation:
        asked.append(request.evaluation)
        return evaluation()

    services.answers["CreateEvaluation"] = create
    short, far, wrong = (tmp_path / name for name in ("a.yaml", "b.json", "c.yaml"))
    short.write_text(YAML)
    far.write_text('{"name": "far", "remote": {"address": "127.0.0.1:50051"}}')
    wrong.write_text("name: far\nremotely: typo\n")
    command = ["evaluations", "create", "--version", "d/v", "--arm", "zero=b", "--arm", "tuned=t"]
    result = run(*command, "--grader", str(short), "--grader", str(far), "--primary-score", "grader.short")
    assert result.exit_code == 0, result.output
    first, second = asked[0].graders
    assert (first.name, first.regex.pattern) == ("short", "^.{0,20}$")
    assert (second.name, second.remote.address) == ("far", "127.0.0.1:50051")
    assert asked[0].primary_score == "grader.short"
    refused = run(*command, "--grader", str(wrong))
    assert refused.exit_code == 2
    assert "c.yaml:2" in refused.output
    assert "remotely" in refused.output
