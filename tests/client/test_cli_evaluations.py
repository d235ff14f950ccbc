"""`luthier evaluations` and `luthier generate` against fake services."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from click.testing import Result

from luthier.v1.dataset_pb2 import (
    SPLIT_TEST,
)
from luthier.v1.evaluation_pb2 import (
    ARM_TEMPLATE_BASE,
    ARM_TEMPLATE_TAUGHT,
    FINISH_REASON_STOP,
    SCORE_DIRECTION_LOWER_IS_BETTER,
    SCORE_KIND_BINARY,
    SCORE_KIND_REAL,
    TEMPLATE_SOURCE_BASE,
    TEMPLATE_SOURCE_TAUGHT,
    TEXT_FORM_NFC,
    VERDICT_BETTER,
    ArmResult,
    Comparison,
    Evaluation,
    Prediction,
    ScoreEstimate,
)
from luthier.v1.evaluation_service_pb2 import GenerateTextResponse, ListPredictionsResponse
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob, MetricPoint
from luthier.v1.model_pb2 import Model
from luthier.v1.training_service_pb2 import ReadFineTuningJobMetricsResponse

Run = Callable[..., Result]
VERSION = "projects/default/datasets/mine/versions/v1"


def test_evaluations_show_compares_the_arms(services: Any, run: Run) -> None:
    evaluation = Evaluation(
        name="projects/default/evaluations/e", state=Evaluation.STATE_SUCCEEDED, num_records=48
    )
    for arm, value in (("base-3", 0.25), ("tuned", 0.75)):
        estimate = ScoreEstimate(
            score="exact_match",
            value=value,
            lower=value - 0.1,
            upper=value + 0.1,
            kind=SCORE_KIND_BINARY,
            text_form=TEXT_FORM_NFC,
        )
        loss = ScoreEstimate(
            score="perplexity",
            value=3.5,
            lower=3,
            upper=4,
            kind=SCORE_KIND_REAL,
            direction=SCORE_DIRECTION_LOWER_IS_BETTER,
        )
        evaluation.arm_results.append(ArmResult(arm_id=arm, scores=[estimate, loss]))
    evaluation.comparisons.append(
        Comparison(
            candidate_arm_id="tuned",
            baseline_arm_id="base-3",
            score="exact_match",
            difference=0.5,
            lower=0.3,
            upper=0.7,
            p_value=0.001,
            count=48,
            verdict=VERDICT_BETTER,
            kind=SCORE_KIND_BINARY,
        )
    )
    services.answers["GetEvaluation"] = lambda request, context: evaluation
    output = run("evaluations", "show", "e").stdout
    assert re.search(r"exact_match +25\.0 % \[15\.0, 35\.0\] +75\.0 % \[65\.0, 85\.0\]", output)
    assert re.search(r"perplexity \(lower is better\) +3\.5 \[3, 4\]", output)
    assert re.search(r"text compared in +NFC", output)
    assert re.search(r"tuned - base-3 +\+50\.0 pp \[\+30\.0, \+70\.0\] +95 % +0\.001 +48 +better", output)


def test_evaluations_show_what_could_not_be_answered(services: Any, run: Run) -> None:
    warning = "arm few could not answer 1 of 12 records; the first, test.jsonl:5: the prompt is too long"
    evaluation = Evaluation(
        name="projects/default/evaluations/e", state=Evaluation.STATE_SUCCEEDED, warnings=[warning]
    )
    for arm, errors in (("zero", 0), ("few", 1)):
        estimate = ScoreEstimate(score="exact_match", value=0.5, lower=0.4, upper=0.6)
        evaluation.arm_results.append(ArmResult(arm_id=arm, scores=[estimate], num_errors=errors))
    prediction = Prediction(row=4, filename="test.jsonl", line=5, reference="red")
    prediction.answers.add(arm_id="few").error.message = "the prompt is too long"
    services.answers["GetEvaluation"] = lambda request, context: evaluation
    services.answers["ListPredictions"] = lambda request, context: ListPredictionsResponse(
        predictions=[prediction]
    )
    output = run("evaluations", "show", "e").stdout
    assert warning in " ".join(output.split()).replace("warning: ", "")
    assert re.search(r"records without an answer +0 +1", output)
    output = run("evaluations", "predictions", "e").stdout
    assert re.search(r"few +! +test\.jsonl:5: the prompt is too long", output)


def test_evaluations_create_reads_the_arms(services: Any, run: Run) -> None:
    seen: list[Evaluation] = []

    def create(request: Any, context: Any) -> Evaluation:
        seen.append(request.evaluation)
        return Evaluation(name="projects/default/evaluations/e")

    services.answers["CreateEvaluation"] = create
    arms = ("--arm", "base-3=m:3", "--arm", "tuned=projects/default/models/t")
    result = run("evaluations", "create", "--version", "mine/v1", *arms, "--metric", "field-match")
    assert result.exit_code == 0, result.output
    assert [(arm.arm_id, arm.model, arm.num_shots) for arm in seen[0].arms] == [
        ("base-3", "projects/default/models/m", 3),
        ("tuned", "projects/default/models/t", 0),
    ]
    assert (seen[0].dataset_version, list(seen[0].metrics), seen[0].split) == (VERSION, [2], SPLIT_TEST)


def test_evaluations_create_names_templates_on_purpose(services: Any, run: Run, tmp_path: Path) -> None:
    seen: list[Evaluation] = []

    def create(request: Any, context: Any) -> Evaluation:
        seen.append(request.evaluation)
        return Evaluation(name="projects/default/evaluations/e")

    services.answers["CreateEvaluation"] = create
    own = tmp_path / "own.jinja"
    own.write_text("{{ messages }} é")
    arms = [word for arm in ("a=m", "b=t", "c=t", "d=t") for word in ("--arm", arm)]
    chosen = ("--template", "a=taught", "--template", "b=base", "--template", f"c={own}")
    result = run("evaluations", "create", "--version", "mine/v1", *arms, *chosen)
    assert result.exit_code == 0, result.output
    wished = [(arm.template, arm.chat_template) for arm in seen[0].arms]
    assert wished == [
        (ARM_TEMPLATE_TAUGHT, ""),
        (ARM_TEMPLATE_BASE, ""),
        (0, "{{ messages }} é"),
        (0, ""),
    ]
    for wrong in ("x=base", "a", f"a={tmp_path / 'none'}"):
        refused = run("evaluations", "create", "--version", "mine/v1", *arms, "--template", wrong)
        assert refused.exit_code == 2
        assert "--template" in refused.output


def test_evaluations_create_gives_arms_system_prompts_of_their_own(
    services: Any, run: Run, tmp_path: Path
) -> None:
    seen: list[Evaluation] = []

    def create(request: Any, context: Any) -> Evaluation:
        seen.append(request.evaluation)
        return Evaluation(name="projects/default/evaluations/e")

    services.answers["CreateEvaluation"] = create
    words = tmp_path / "words.txt"
    words.write_text("Answer with é.\n")
    arms = [word for arm in ("a=m", "b=m", "c=m") for word in ("--arm", arm)]
    chosen = ("--system-prompt", "a=x=1, that is all", "--system-prompt", f"b=@{words}")
    result = run("evaluations", "create", "--version", "mine/v1", *arms, *chosen)
    assert result.exit_code == 0, result.output
    assert [arm.system_prompt for arm in seen[0].arms] == ["x=1, that is all", "Answer with é.\n", ""]
    for wrong in ("x=words", "a", "a=", f"a=@{tmp_path / 'none'}"):
        refused = run("evaluations", "create", "--version", "mine/v1", *arms, "--system-prompt", wrong)
        assert refused.exit_code == 2
        assert "--system-prompt" in refused.output


def test_evaluations_show_says_what_each_arm_was_asked_with(services: Any, run: Run) -> None:
    evaluation = Evaluation(name="projects/default/evaluations/e", state=Evaluation.STATE_SUCCEEDED)
    for arm, source in (("zero", TEMPLATE_SOURCE_BASE), ("tuned", TEMPLATE_SOURCE_TAUGHT)):
        evaluation.arm_results.add(
            arm_id=arm, template_source=source, template_digest=arm[0] * 64, template_date="2026-11-28"
        )
    evaluation.arms.add(arm_id="zero", system_prompt="Be brief.")
    services.answers["GetEvaluation"] = lambda request, context: evaluation
    output = run("evaluations", "show", "e").stdout
    assert re.search(r"system prompt of zero +Be brief\.", output)
    assert re.search(r"asked zero +the base model's template \(zzzzzzzz, 2026-11-28\)", output)
    assert re.search(r"asked tuned +the template that was taught \(tttttttt, 2026-11-28\)", output)


def test_generate_warns_when_nothing_says_how_a_tuned_model_was_taught(services: Any, run: Run) -> None:
    def generate(request: Any, context: Any) -> Iterator[GenerateTextResponse]:
        yield GenerateTextResponse(
            text="a", finish_reason=FINISH_REASON_STOP, template_source=TEMPLATE_SOURCE_BASE
        )

    services.answers["GenerateText"] = generate
    services.answers["GetModel"] = lambda request, context: Model(
        name=request.name, base_model="projects/default/models/m" if request.name.endswith("/t") else ""
    )
    assert "warning: nothing says any more how t was taught" in run("generate", "--model", "t", "q").stderr
    assert run("generate", "--model", "m", "q").stderr == ""


def test_evaluations_report_writes_the_file(services: Any, run: Run, tmp_path: Path) -> None:
    evaluation = Evaluation(name="projects/default/evaluations/e", state=Evaluation.STATE_SUCCEEDED)
    evaluation.arms.add(arm_id="tuned", model="projects/default/models/t")
    tuned = Model(name="projects/default/models/t", fine_tuning_job="projects/default/fineTuningJobs/j")
    job = FineTuningJob(name="projects/default/fineTuningJobs/j")
    points = [MetricPoint(step=step, values={"train_loss": 1.0 / step}) for step in (1, 2)]
    services.answers.update(
        GetEvaluation=lambda request, context: evaluation,
        ListPredictions=lambda request, context: ListPredictionsResponse(),
        GetModel=lambda request, context: tuned,
        GetFineTuningJob=lambda request, context: job,
        ReadFineTuningJobMetrics=lambda request, context: ReadFineTuningJobMetricsResponse(points=points),
    )
    output = tmp_path / "report.html"
    result = run("evaluations", "report", "e", "--output", str(output))
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{output}\n"
    assert 'class="train"' in output.read_text()


def _answering(services: Any) -> list[Any]:
    seen: list[Any] = []

    def generate(request: Any, context: Any) -> Iterator[GenerateTextResponse]:
        seen.append(request)
        yield GenerateTextResponse(text="two ")
        yield GenerateTextResponse(text="words", finish_reason=FINISH_REASON_STOP, num_generated_tokens=2)

    services.answers["GenerateText"] = generate
    return seen


def test_generate_streams_the_answer(services: Any, run: Run) -> None:
    seen = _answering(services)
    assert run("generate", "--model", "m", "--system", "Be brief.", "Say two words").stdout == "two words\n"
    assert [(turn.role, turn.content) for turn in seen[0].conversation.messages] == [
        ("system", "Be brief."),
        ("user", "Say two words"),
    ]
    assert run("generate", "--model", "m", "--raw", stdin="Once upon").stdout == "two words\n"
    assert seen[1].prompt == "Once upon"
    lines = run("generate", "--model", "m", "hello", "--json").stdout.splitlines()
    assert json.loads(lines[1]) == {
        "text": "words",
        "finish_reason": "FINISH_REASON_STOP",
        "num_generated_tokens": 2,
    }
    assert run("generate", "--model", "m", stdin="").exit_code == 2
