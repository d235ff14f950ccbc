"""The HTML report, made from messages."""

from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from tests.client.report_data import BASE, HOSTILE, PARENT, comparison, earnings, prediction

from luthier.client.report import ReportData, render_report
from luthier.client.report_charts import interval_chart, loss_curve
from luthier.client.report_filter import FILTER_SCRIPT
from luthier.client.report_verdict import headline_comparison
from luthier.v1.evaluation_pb2 import (
    CORRECTNESS_RIGHT,
    SCORE_KIND_REAL,
    ArmPrediction,
    ArmResult,
    Evaluation,
    EvaluationArm,
    Prediction,
    ScoreEstimate,
)
from luthier.v1.fine_tuning_job_pb2 import (
    MetricPoint,
)


@pytest.fixture
def data() -> ReportData:
    return earnings()


class _Checker(HTMLParser):
    """Fails on unbalanced tags; keeps what could load something from elsewhere."""

    VOID = frozenset({"meta", "br", "line", "circle", "polyline", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [f"{name}={value}" for name, value in attrs if name in ("src", "href")]
        self.loads += [tag] if tag in ("link", "img", "iframe") else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_render_report_is_one_well_formed_file_that_loads_nothing(data: ReportData) -> None:
    html = render_report(data)
    checker = _Checker()
    checker.feed(html)
    assert checker.open == []
    assert checker.loads == []
    assert "url(" not in html
    assert "@import" not in html
    assert html.count("<script") == html.count(FILTER_SCRIPT) == 1
    assert not {word for word in ("fetch", "XMLHttp", "import(", "http") if word in FILTER_SCRIPT}


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
    many = replace(data, predictions=[prediction(row) for row in range(250)])
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
        comparisons=[comparison("c", "a", -4.0, "perplexity"), comparison("c", "b", -1.0, "perplexity")],
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
