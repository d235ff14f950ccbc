"""Evaluations that ended early: what there is of them is shown, and said to be a part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from google.rpc import status_pb2

from luthier.client.partial_answers import early_end, has_answers, partial_words
from luthier.client.report import ReportData, render_report
from luthier.v1.evaluation_pb2 import Evaluation, EvaluationArm, Prediction
from luthier.v1.evaluation_service_pb2 import ListPredictionsResponse
from luthier.v1.event_pb2 import Progress
from luthier.v1.model_pb2 import Model

PARENT = "projects/default"
WHY = "the worker has <no> memory left."
FAILED_WORDS = (
    "FAILED: the worker has <no> memory left. 7 of 24 answers had come, kept are those to 4 records (zero 4 with 1 "
    "error, tuned 2). They are not scored, and there is no verdict: what was asked first need not be like the rest."
)


def ended(state: Evaluation.State.ValueType, **fields: Any) -> Evaluation:
    arms = [EvaluationArm(arm_id=name, model=f"{PARENT}/models/{name}") for name in ("zero", "tuned")]
    return Evaluation(name=f"{PARENT}/evaluations/e", state=state, arms=arms, **fields)


def failed() -> Evaluation:
    return ended(
        Evaluation.STATE_FAILED,
        error=status_pb2.Status(code=8, message=WHY),
        progress=Progress(completed=7, total=24),
        num_records=4,
    )


def answers() -> list[Prediction]:
    """Both arms' answers to two records, and one's to two more, of which one failed."""
    found = []
    for row in range(4):
        one = Prediction(row=row, filename="a.jsonl", line=row + 1)
        one.prompt.add(role="user", content=f"question {row}")
        one.answers.add(arm_id="zero", text="x")
        if row < 2:
            one.answers.add(arm_id="tuned", text="y")
        found.append(one)
    found[3].answers[0].error.message = "too long"
    return found


def test_it_is_said_how_it_ended_why_and_how_much_there_is() -> None:
    assert partial_words(failed(), answers()) == FAILED_WORDS
    cancelled = ended(Evaluation.STATE_CANCELLED, num_records=4)
    assert partial_words(cancelled, answers()).startswith(
        "CANCELLED. Of its answers kept are those to 4 records (zero 4 with 1 error, tuned 2). They are not"
    )


def test_of_one_that_ended_before_its_first_answer_none_are_kept() -> None:
    cancelled = ended(Evaluation.STATE_CANCELLED)
    assert not has_answers(cancelled)
    assert partial_words(cancelled, []).startswith("CANCELLED. Of its answers none are kept. They")
    assert has_answers(failed())


@pytest.mark.parametrize("state", [Evaluation.STATE_SUCCEEDED, Evaluation.STATE_RUNNING])
def test_of_every_other_nothing_is_said(state: Evaluation.State.ValueType) -> None:
    evaluation = ended(state, num_records=4)
    assert (early_end(evaluation), partial_words(evaluation, answers())) == ("", "")
    assert has_answers(evaluation)


def test_a_report_begins_with_it_and_has_the_answers_below() -> None:
    page = render_report(ReportData(evaluation=failed(), predictions=answers()))
    body = page[page.index("</header>") + len("</header>\n") :]
    words = FAILED_WORDS.replace("<no>", "&lt;no&gt;")
    assert body.startswith(f'<section class="headline worse"><strong>{words}</strong></section>')
    assert "question 1" in body
    whole = ended(Evaluation.STATE_SUCCEEDED, num_records=4)
    assert "are not scored" not in render_report(ReportData(evaluation=whole, predictions=answers()))


def test_the_report_of_one_without_an_answer_asks_for_none(
    services: Any, run: Callable[..., Result], tmp_path: Path
) -> None:
    """The service would refuse, and say nothing of why there are none."""
    services.answers["GetEvaluation"] = lambda request, context: ended(Evaluation.STATE_CANCELLED)
    services.answers["GetModel"] = lambda request, context: Model(name=request.name)
    path = tmp_path / "report.html"
    done = run("evaluations", "report", "e", "--output", str(path))
    assert done.exit_code == 0, done.output
    assert "CANCELLED. Of its answers none are kept." in path.read_text()


def test_who_exports_a_part_is_told_that_it_is_one(
    services: Any, run: Callable[..., Result], tmp_path: Path
) -> None:
    services.answers["ListPredictions"] = lambda request, context: ListPredictionsResponse(
        predictions=answers()
    )
    path = tmp_path / "answers.jsonl"
    for evaluation, is_part in ((failed(), True), (ended(Evaluation.STATE_SUCCEEDED, num_records=4), False)):
        services.answers["GetEvaluation"] = lambda request, context, found=evaluation: found
        done = run("evaluations", "export", "e", "--output", str(path))
        assert done.exit_code == 0, done.output
        assert (f"only some of its answers, as it ended early: FAILED: {WHY}" in done.stderr) == is_part
        assert len(path.read_text().splitlines()) == 6
