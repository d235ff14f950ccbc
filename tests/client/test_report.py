"""The HTML report, made from messages."""

import math
import random
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from luthier.client.report import ReportData, TuningRun, render_report
from luthier.client.report_charts import interval_chart, loss_curve
from luthier.client.report_verdict import headline_comparison
from luthier.v1.chat_pb2 import ChatMessage
from luthier.v1.dataset_pb2 import SPLIT_TEST
from luthier.v1.evaluation_pb2 import (
    CORRECTNESS_RIGHT,
    CORRECTNESS_WRONG,
    SCORE_DIRECTION_HIGHER_IS_BETTER,
    SCORE_DIRECTION_LOWER_IS_BETTER,
    SCORE_KIND_BINARY,
    SCORE_KIND_FRACTION,
    SCORE_KIND_REAL,
    TEXT_FORM_NFC,
    VERDICT_BETTER,
    VERDICT_INCONCLUSIVE,
    ArmPrediction,
    ArmResult,
    Comparison,
    Evaluation,
    EvaluationArm,
    Prediction,
    ScoreDirection,
    ScoreEstimate,
    ScoreKind,
)
from luthier.v1.fine_tuning_job_pb2 import (
    DETERMINISM_BITWISE,
    LEARNING_RATE_SCHEDULE_COSINE,
    FineTuningJob,
    Hyperparameters,
    LoraConfig,
    MetricPoint,
    RunRecord,
)
from luthier.v1.model_pb2 import Model

PARENT = "projects/default"
BASE, TUNED = f"{PARENT}/models/smollm2-135m-instruct-q4", f"{PARENT}/models/earnings-1"
ARMS = (("base-0", BASE, 0, 0.0), ("base-3", BASE, 3, 0.25), ("tuned", TUNED, 0, 0.75))
HOSTILE = '<script>alert("1 & 2")</script>'


def _kind(score: str) -> ScoreKind.ValueType:
    kinds = {"perplexity": SCORE_KIND_REAL, "field_match.fields": SCORE_KIND_FRACTION}
    return kinds.get(score, SCORE_KIND_BINARY)


def _direction(score: str) -> ScoreDirection.ValueType:
    return SCORE_DIRECTION_LOWER_IS_BETTER if score == "perplexity" else SCORE_DIRECTION_HIGHER_IS_BETTER


def _arm_result(arm_id: str, record: float) -> ArmResult:
    def estimate(score: str, value: float, half: float) -> ScoreEstimate:
        return ScoreEstimate(
            score=score,
            value=value,
            lower=max(0.0, value - half),
            upper=min(1.0, value + half),
            count=48,
            kind=_kind(score),
            text_form=TEXT_FORM_NFC,
            whole_answer=score == "field_match.record",
        )

    fields = min(1.0, record + 0.2)
    scores = [estimate("field_match.record", record, 0.12), estimate("field_match.fields", fields, 0.05)]
    scores += [
        estimate(f"field_match.field.{name}", fields, 0.08) for name in ("company", "revenue", "currency")
    ]
    perplexity = ScoreEstimate(
        score="perplexity",
        value=9 - 7 * record,
        lower=8 - 7 * record,
        upper=10 - 7 * record,
        kind=_kind("perplexity"),
        direction=_direction("perplexity"),
    )
    return ArmResult(arm_id=arm_id, scores=[*scores, perplexity], duration_seconds=12.5, num_cut=2)


def _comparison(candidate: str, baseline: str, difference: float, score: str) -> Comparison:
    return Comparison(
        candidate_arm_id=candidate,
        baseline_arm_id=baseline,
        score=score,
        difference=difference,
        lower=difference - 0.14,
        upper=difference + 0.14,
        p_value=0.00012,
        count=48,
        verdict=VERDICT_BETTER if difference > 0.14 else VERDICT_INCONCLUSIVE,
        kind=_kind(score),
        direction=_direction(score),
        whole_answer=score == "field_match.record",
    )


def _prediction(row: int) -> Prediction:
    reference = '{"company": "Nordwind AG", "period": "Q3 2025", "revenue": 412.5, "currency": "EUR"}'
    question = f"Nordwind AG said revenue rose to EUR {412 + row}.5 million in the third quarter of 2025."
    texts = (
        "Nordwind AG is a company that " + "grew a lot " * 8,
        reference.replace("412.5", "398"),
        reference,
    )
    answers = [
        ArmPrediction(
            arm_id=arm,
            text=text,
            scores={"field_match.record": float(arm == "tuned")},
            correctness=CORRECTNESS_RIGHT if arm == "tuned" else CORRECTNESS_WRONG,
        )
        for (arm, *_), text in zip(ARMS, texts, strict=True)
    ]
    prompt = [
        ChatMessage(role="system", content="Answer with JSON."),
        ChatMessage(role="user", content=question if row else f"{question} {HOSTILE}"),
    ]
    return Prediction(row=row, prompt=prompt, reference=reference, answers=answers)


def _run() -> TuningRun:
    generator = random.Random(0)
    points = [
        MetricPoint(
            step=step, values={"train_loss": 0.4 + 2 * math.exp(-step / 9) + generator.uniform(-0.1, 0.1)}
        )
        for step in range(1, 42)
    ]
    for step in (1, 10, 20, 30, 41):
        points[step - 1].values["validation_loss"] = 0.5 + 1.9 * math.exp(-step / 9)
    job = FineTuningJob(
        name=f"{PARENT}/fineTuningJobs/earnings-1",
        base_model=BASE,
        rendering=f"{PARENT}/renderings/earnings",
        tuned_model=TUNED,
        lora=LoraConfig(rank=16, alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
        hyperparameters=Hyperparameters(
            batch_tokens=4096,
            learning_rate=2e-4,
            learning_rate_schedule=LEARNING_RATE_SCHEDULE_COSINE,
            seed=7,
        ),
        num_attempts=1,
        run_record=RunRecord(
            code_version="0.1.0",
            device="x86-64 AVX-512-BF16",
            torch_version="2.13.0",
            num_threads=2,
            kernels={"linear_cross_entropy": "cpu"},
            base_model_digest="ab" * 32,
            determinism=DETERMINISM_BITWISE,
        ),
    )
    job.progress.completed = 41
    job.start_time.seconds, job.end_time.seconds = 1_000, 1_225
    return TuningRun(job=job, metrics=points)


@pytest.fixture
def data() -> ReportData:
    evaluation = Evaluation(
        name=f"{PARENT}/evaluations/earnings-1",
        display_name="Earnings: tuned against prompts",
        dataset_version=f"{PARENT}/datasets/earnings/versions/v1",
        dataset_digest="cd" * 32,
        split=SPLIT_TEST,
        num_records=48,
        arms=[EvaluationArm(arm_id=arm, model=model, num_shots=shots) for arm, model, shots, _ in ARMS],
        arm_results=[_arm_result(arm, record) for arm, _, _, record in ARMS],
        comparisons=[
            _comparison(candidate, baseline, difference, score)
            for score in ("field_match.fields", "field_match.record")
            for candidate, baseline, difference in (
                ("base-3", "base-0", 0.1),
                ("tuned", "base-0", 0.75),
                ("tuned", "base-3", 0.5),
            )
        ],
    )
    evaluation.end_time.seconds = 1_763_900_000
    models = {
        BASE: Model(
            name=BASE, kind=Model.KIND_BASE, architecture="LlamaForCausalLM", num_parameters=134_515_008
        ),
        TUNED: Model(name=TUNED, kind=Model.KIND_ADAPTER, base_model=BASE, digest="ef" * 32),
    }
    predictions = [_prediction(row) for row in range(6)]
    return ReportData(evaluation=evaluation, predictions=predictions, models=models, runs=[_run()])


class _Checker(HTMLParser):
    """Fails on unbalanced tags; keeps what could load something from elsewhere."""

    VOID = frozenset({"meta", "br", "line", "circle", "polyline"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [f"{name}={value}" for name, value in attrs if name in ("src", "href")]
        self.loads += [tag] if tag in ("script", "link", "img", "iframe") else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_render_report_is_one_well_formed_file_without_scripts(data: ReportData) -> None:
    html = render_report(data)
    checker = _Checker()
    checker.feed(html)
    assert checker.open == []
    assert checker.loads == []
    assert "url(" not in html
    assert "@import" not in html


def test_render_report_escapes_what_models_and_people_wrote(data: ReportData) -> None:
    data.predictions[1].answers[0].text = HOSTILE
    data.evaluation.display_name = HOSTILE
    html = render_report(data)
    assert HOSTILE not in html
    assert html.count("&lt;script&gt;") == 4


def test_render_report_says_who_won_and_by_how_much(data: ReportData) -> None:
    html = render_report(data)
    headline = html[html.index('class="headline') : html.index("</section>")]
    assert "<b>tuned</b> against <b>base-3</b>" in headline
    assert "+50.0 percentage points [+36.0, +64.0]" in headline
    assert 'class="badge better">better<' in headline


def test_render_report_says_in_which_form_texts_were_compared_and_which_scores_are_better(
    data: ReportData,
) -> None:
    html = render_report(data)
    assert "Texts are compared in the Unicode form NFC." in html
    assert html.count("lower is better") == 1
    assert "<code>perplexity</code> <small>lower is better</small>" in html


def test_render_report_shows_a_score_as_the_service_says_not_as_its_name_sounds(data: ReportData) -> None:
    score = ScoreEstimate(score="exact_match", value=12.5, lower=12, upper=13, kind=SCORE_KIND_REAL)
    evaluation = Evaluation(arm_results=[ArmResult(arm_id="a", scores=[score])])
    html = render_report(ReportData(evaluation=evaluation))
    assert "12.5 <small>[12, 13]</small>" in html
    assert "Unicode form" not in html


def test_render_report_marks_right_and_wrong_answers(data: ReportData) -> None:
    html = render_report(data)
    assert html.count("✓ right") == 6
    assert html.count("✗ wrong") == 12
    assert "tuned 6/6 right" in html


def test_render_report_says_when_not_all_answers_are_shown(data: ReportData) -> None:
    many = replace(data, predictions=[_prediction(row) for row in range(250)])
    html = render_report(many)
    assert html.count('class="prediction"') == 200
    assert "tuned 250/250 right" in html
    assert "the first 200 of 250 are shown" in html


def test_render_report_shows_the_run_record(data: ReportData) -> None:
    html = render_report(data)
    for fact in (
        "x86-64 AVX-512-BF16",
        "linear_cross_entropy: cpu",
        "bitwise",
        "225 s",
        "rank 16, alpha 32",
        "ab" * 32,
    ):
        assert fact in html


def test_render_report_shows_what_an_adapter_is_besides_its_rank(data: ReportData) -> None:
    job = data.runs[0].job
    job.lora.dropout = 0.05
    job.lora.rank_pattern["v_proj"] = 8
    job.lora.alpha_pattern[r"layers\.<0>"] = 3.5
    job.lora.trained_modules.append("embed_tokens")
    html = render_report(data)
    for fact in ("0.05", "v_proj 8", r"layers\.&lt;0&gt; 3.5", "embed_tokens"):
        assert fact in html


def test_render_report_of_an_evaluation_without_results_leaves_their_sections_out() -> None:
    html = render_report(ReportData(evaluation=Evaluation(name=f"{PARENT}/evaluations/e")))
    assert "<h2>Results" not in html
    assert "Where it comes from" in html


def test_headline_comparison_holds_the_last_arm_against_its_strongest_rival(data: ReportData) -> None:
    chosen = headline_comparison(data.evaluation)
    assert chosen is not None
    assert (chosen.candidate_arm_id, chosen.baseline_arm_id) == ("tuned", "base-3")
    assert chosen.score == "field_match.record"
    assert headline_comparison(Evaluation()) is None


def test_headline_comparison_takes_the_lower_perplexity_as_the_stronger_rival() -> None:
    evaluation = Evaluation(
        arms=[EvaluationArm(arm_id=arm) for arm in "abc"],
        comparisons=[_comparison("c", "a", -4.0, "perplexity"), _comparison("c", "b", -1.0, "perplexity")],
    )
    chosen = headline_comparison(evaluation)
    assert chosen is not None
    assert chosen.baseline_arm_id == "b"


def _coordinates(svg: str, kind: str) -> list[tuple[float, float]]:
    line = next(node for node in ElementTree.fromstring(svg).iter("polyline") if node.get("class") == kind)
    pairs = [pair.split(",") for pair in (line.get("points") or "").split()]
    return [(float(x), float(y)) for x, y in pairs]


def test_loss_curve_draws_a_falling_loss_from_top_left_to_bottom_right() -> None:
    points = [MetricPoint(step=step, values={"train_loss": 3.0 - step}) for step in (1, 2)]
    (x1, y1), (x2, y2) = _coordinates(loss_curve(points), "train")
    assert x1 < x2
    assert y1 < y2


def test_loss_curve_smooths_long_runs_and_leaves_out_what_is_not_a_number() -> None:
    points = [MetricPoint(step=step, values={"train_loss": float(step % 2)}) for step in range(1, 101)]
    points[50].values["train_loss"] = float("nan")
    svg = loss_curve(points)
    assert len(_coordinates(svg, "train-raw")) == 99
    heights = [y for _, y in _coordinates(svg, "train")]
    assert max(heights[20:]) - min(heights[20:]) < 60
    assert "nan" not in svg


@pytest.mark.parametrize("points", [[], [MetricPoint(step=1, values={"gradient_norm": 1.0})]])
def test_loss_curve_of_nothing_is_empty(points: list[MetricPoint]) -> None:
    assert loss_curve(points) == ""


def test_loss_curve_of_one_step_is_drawn() -> None:
    svg = loss_curve([MetricPoint(step=1, values={"train_loss": 2.0, "validation_loss": 2.0})])
    assert len(_coordinates(svg, "train")) == 1
    ElementTree.fromstring(svg)


def test_interval_chart_stays_inside_its_picture() -> None:
    estimates = [("a" * 60, ScoreEstimate(value=35.0, lower=20.0, upper=61.0)), ("b", ScoreEstimate())]
    picture = ElementTree.fromstring(interval_chart("perplexity", estimates))
    for line in picture.iter("line"):
        assert 0 <= float(line.get("x1") or -1) <= float(line.get("x2") or -1) <= 960


def test_records_without_an_answer_are_shown_with_their_place_and_count_as_nothing() -> None:
    evaluation = Evaluation(name=f"{PARENT}/evaluations/e", warnings=[f"the first, a.jsonl:5: {HOSTILE}"])
    evaluation.arms.add(arm_id="zero", model=BASE)
    evaluation.arm_results.add(arm_id="zero", num_errors=1).scores.add(score="exact_match", value=1.0)
    answered = Prediction(
        row=0,
        answers=[
            ArmPrediction(arm_id="zero", text="x", scores={"exact_match": 1.0}, correctness=CORRECTNESS_RIGHT)
        ],
    )
    failed = Prediction(row=1, filename="a.jsonl", line=5, answers=[ArmPrediction(arm_id="zero")])
    failed.answers[0].error.message = "the prompt is too long"
    page = render_report(ReportData(evaluation=evaluation, predictions=[answered, failed]))
    assert "a.jsonl:5: the prompt is too long" in page
    assert "zero 1/1 right" in page
    assert "records without an answer" in page
    assert HOSTILE not in page
