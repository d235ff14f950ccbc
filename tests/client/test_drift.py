"""Drift in words, on a terminal, in the report and on the card."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from click.testing import Result
from rich.console import Console

from luthier.client.cli.evaluation_views import evaluation_facts
from luthier.client.drift import divergence_words, retained_words, skill_words, text_loss_words
from luthier.client.model_card import Found, written
from luthier.client.report import ReportData, render_report
from luthier.v1.evaluation_pb2 import (
    SCORE_KIND_BINARY,
    SCORE_KIND_REAL,
    DriftResult,
    Evaluation,
    EvaluationArm,
    ScoreEstimate,
    SkillDrift,
)
from luthier.v1.model_pb2 import Model

PARENT = "projects/default"


def drifted() -> DriftResult:
    return DriftResult(
        arm_id="tuned",
        baseline_arm_id="zero",
        retained=ScoreEstimate(value=0.75, lower=0.6, upper=0.85, count=40, kind=SCORE_KIND_BINARY),
        skills=[
            SkillDrift(skill="facts", num_asked=30, num_known=25, num_kept=20, num_gained=1),
            SkillDrift(skill="grammar", num_asked=20, num_known=15, num_kept=10),
        ],
        divergence=ScoreEstimate(value=0.123, lower=0.1, upper=0.15, count=50, kind=SCORE_KIND_REAL),
        text_loss=ScoreEstimate(value=0.25, lower=0.2, upper=0.3, count=12, kind=SCORE_KIND_REAL),
        baseline_text_bits=1.5,
    )


def evaluation() -> Evaluation:
    return Evaluation(
        name=f"{PARENT}/evaluations/e",
        arms=[
            EvaluationArm(arm_id="zero", model=f"{PARENT}/models/b", base_model=f"{PARENT}/models/b"),
            EvaluationArm(
                arm_id="tuned", model=f"{PARENT}/models/whole", base_model=f"{PARENT}/models/whole"
            ),
        ],
        drift_results=[drifted()],
    )


def test_words_say_what_is_retained_and_what_could_not_be_measured() -> None:
    found = drifted()
    assert retained_words(found) == "75.0 % [60.0, 85.0] of 40, 1 gained"
    assert dict(skill_words(found)) == {"facts": "20 of 25, 1 gained", "grammar": "10 of 15"}
    assert divergence_words(found) == "0.123 [0.1, 0.15] nats per token"
    assert text_loss_words(found) == "+0.25 [+0.2, +0.3] on 1.5 bits a byte"
    found.text_loss.lower = found.text_loss.upper = found.text_loss.value
    assert text_loss_words(found) == "+0.25 on 1.5 bits a byte", "each text lost the same"
    found.ClearField("divergence")
    assert divergence_words(found) == "not measured: other tokens"
    found.num_drawn_tokens = 7
    assert divergence_words(found) == "not measured: see the warnings"
    unasked = DriftResult(arm_id="tuned", baseline_arm_id="zero")
    assert retained_words(unasked) == "not measured: zero answered no question"
    nothing = DriftResult(
        arm_id="tuned", baseline_arm_id="zero", skills=[SkillDrift(skill="facts", num_asked=3)]
    )
    assert retained_words(nothing) == "nothing to retain: zero has no question right"
    assert divergence_words(nothing) == text_loss_words(nothing) == "not measured"


def test_a_terminal_shows_what_was_forgotten_and_what_stands_below_arms() -> None:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(evaluation_facts(evaluation()))
    shown = capture.get()
    for words in (
        "75.0 % [60.0, 85.0] of 40, 1 gained",
        "20 of 25, 1 gained",
        "0.123 [0.1, 0.15]",
        "below tuned",
        "whole",
    ):
        assert words in shown, shown


def test_a_report_has_it_before_the_comparisons_and_only_where_it_was_measured() -> None:
    found = evaluation()
    page = render_report(ReportData(evaluation=found))
    assert "<h2>What was forgotten</h2>" in page
    assert "75.0 % [60.0, 85.0] of 40, 1 gained" in page
    assert ">On</th>" in page, "arms stand on several base models"
    del found.drift_results[:]
    for arm in found.arms:
        arm.base_model = f"{PARENT}/models/b"
    page = render_report(ReportData(evaluation=found))
    assert "What was forgotten" not in page
    assert ">On</th>" not in page


def test_a_card_tells_what_the_model_retains() -> None:
    card = written(Found(model=Model(name="m"), job=None, renderings=[], evaluations=[evaluation()]))
    assert "## What was forgotten" in card
    assert (
        "| `e` | tuned (`whole`), from zero | 75.0 % [60.0, 85.0] of 40, 1 gained "
        "| 0.123 [0.1, 0.15] nats per token | +0.25"
    ) in card


def test_flags_say_what_is_measured_and_what_must_be_retained(
    services: Any, run: Callable[..., Result]
) -> None:
    asked: list[Evaluation] = []

    def create(request: Any, context: Any) -> Evaluation:
        asked.append(request.evaluation)
        return evaluation()

    services.answers["CreateEvaluation"] = create
    command = ["evaluations", "create", "--version", "d/v", "--arm", "zero=b", "--arm", "tuned=whole"]
    for flags in ([], ["--drift"], ["--drift", "--guard", "drift=0.9", "--drift-baseline", "zero"]):
        result = run(*command, *flags)
        assert result.exit_code == 0, result.output
    plain, measured, guarded = asked
    assert not plain.HasField("drift")
    assert measured.HasField("drift")
    assert not measured.guards
    assert guarded.drift.baseline_arm_id == "zero"
    assert [guard.drift.min_retained for guard in guarded.guards] == [0.9]
    for wrong in ("drift=much", "drift=0.9:zero"):
        result = run(*command, "--drift", "--guard", wrong)
        assert result.exit_code == 2
        assert f"must be SCORE=LOSS, SCORE=LOSS:ARM or drift=LEAST, got '{wrong}'" in result.output
