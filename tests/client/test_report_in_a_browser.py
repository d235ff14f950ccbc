"""Reports in Chromium: nobody is kept from reading them, on a phone or a wide window, as far as axe-core can tell."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from google.rpc import status_pb2
from tests.client.report_data import earnings, prediction
from tests.client.test_judges import judged

from luthier.client.report import ReportData, render_report, render_run
from luthier.v1.evaluation_pb2 import DriftResult, ScoreEstimate, SkillDrift
from luthier.v1.grader_pb2 import GraderErrors, GraderResult
from luthier.v1.judge_pb2 import JUDGE_PREFERENCE_TIE, Judgement
from luthier.v1.verdict_pb2 import EvaluationVerdict, GuardResult

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(shutil.which("npm") is None, reason="Node is not installed"),
]

PHONE, WIDE = 360, 1280
INSPECT = Path(__file__).parents[1] / "browser" / "inspect.mjs"
BROKEN = """<!doctype html><html><head><title>Broken</title></head><body>
<h1>Broken</h1><h4>below nothing</h4><p style="color:#ccc">pale</p><div style="width:900px">wide</div>
<table><tr><th></th><td>1</td></tr></table></body></html>
"""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What was seen of a page at one width."""

    name: str
    width: int
    widest: int
    rules: set[str]
    violations: list[dict[str, str]]
    requests: list[str]


def inspected(folder: Path, pages: dict[str, str]) -> list[Seen]:
    """Open pages in Chromium, on a phone and on a wide window."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.fail("chromium is missing: bash tests/debian.sh installs what the tests need of Debian")
    for name, text in pages.items():
        (folder / f"{name}.html").write_text(text)
    command: list[str | Path] = [
        "node",
        INSPECT,
        chromium,
        folder,
        f"{PHONE},{WIDE}",
        *(folder / f"{name}.html" for name in pages),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return [
        Seen(
            name=Path(one["page"]).stem,
            width=one["width"],
            widest=one["widest"],
            rules=set(one["passed"]),
            violations=one["violations"],
            requests=one["requests"],
        )
        for one in found
    ]


def everything() -> ReportData:
    """A report that has every section, and of each what is seldom there."""
    data = earnings()
    evaluation = data.evaluation
    evaluation.warnings.append("arm tuned: 2 answers were cut at max_new_tokens; " + "a-long-name" * 12)
    evaluation.verdict.CopyFrom(
        EvaluationVerdict(
            outcome=EvaluationVerdict.OUTCOME_FINE_TUNE_WINS,
            sentence="Fine-tuning wins: tuned is better than every prompt by 50.0 pp [36.0, 64.0] or more.",
            score="field_match.record",
            candidate_arm_id="tuned",
            rival_arm_id="base-3",
            guards=[
                GuardResult(standing=standing, sentence="tuned retains 92.1 % [88.0, 95.0] of the suite")
                for standing in (
                    GuardResult.STANDING_HELD,
                    GuardResult.STANDING_BROKEN,
                    GuardResult.STANDING_UNDECIDED,
                )
            ],
        )
    )
    estimate = ScoreEstimate(value=0.92, lower=0.88, upper=0.95, count=158)
    skills = [
        SkillDrift(skill=name, num_asked=40, num_known=30, num_kept=28) for name in ("facts", "arithmetic")
    ]
    evaluation.drift_results.append(
        DriftResult(
            arm_id="tuned", baseline_arm_id="base-0", retained=estimate, divergence=estimate, skills=skills
        )
    )
    evaluation.judge_results.append(judged())
    evaluation.grader_results.append(
        GraderResult(
            name="concise",
            num_graded=144,
            num_errors=2,
            errors=[GraderErrors(reason="GRADER_ANSWER_INVALID", count=2, first_message="no number")],
        )
    )
    failed, long = prediction(8), prediction(9)
    failed.answers[1].error.CopyFrom(status_pb2.Status(code=3, message="the prompt has 9,000 tokens"))
    long.answers[0].text = "unbroken" * 90
    failed.judgements.append(
        Judgement(judge_id="helpful", arm_id="tuned", rival_arm_id="base-3", preference=JUDGE_PREFERENCE_TIE)
    )
    return replace(data, predictions=[*data.predictions, failed, long])


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[Seen]:
    pages = {
        "evaluation": render_report(everything()),
        "first-steps": render_report(earnings()),
        "job": render_run(earnings().runs[0]),
        "broken": BROKEN,
    }
    return inspected(tmp_path_factory.mktemp("pages"), pages)


def test_reports_have_nothing_that_keeps_people_from_reading_them(seen: list[Seen]) -> None:
    reports = [one for one in seen if one.name != "broken"]
    assert len(reports) == 3 * 2
    told = [f"{one.name} at {one.width}: {each}" for one in reports for each in one.violations]
    assert not told, "\n".join(told)
    for one in reports:
        wanted = {"color-contrast", "document-title", "html-has-lang", "heading-order", "svg-img-alt"}
        assert wanted <= one.rules, "axe-core looked at them"
        assert one.requests[1:] == [], "one file, that asks for nothing"


def test_reports_are_as_wide_as_the_window(seen: list[Seen]) -> None:
    assert {(one.name, one.width, one.widest) for one in seen if one.name != "broken"} == {
        (name, width, width) for name in ("evaluation", "first-steps", "job") for width in (PHONE, WIDE)
    }


def test_answers_are_filtered_by_words_and_by_who_is_better(tmp_path: Path) -> None:
    data = earnings()
    data.evaluation.verdict.CopyFrom(
        EvaluationVerdict(score="field_match.record", candidate_arm_id="tuned", rival_arm_id="base-3")
    )
    alike, lost = prediction(6), prediction(7)
    for one, value in ((alike, 1.0), (lost, 2.0)):
        one.answers[1].scores["field_match.record"] = value
    page = tmp_path / "report.html"
    page.write_text(render_report(replace(data, predictions=[*data.predictions, alike, lost])))
    chromium = shutil.which("chromium")
    assert chromium is not None
    choices = ["/", "any/", "gained/", "lost/", "/EUR 413.5", "lost/EUR 413.5"]
    command: list[str | Path] = ["node", INSPECT.with_name("filter.mjs"), chromium, page, *choices]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [len(one["cards"]) for one in found] == [8, 7, 6, 1, 1, 0]
    assert [one["told"] for one in found][2:] == [
        "6 of 8 shown",
        "1 of 8 shown",
        "1 of 8 shown",
        "0 of 8 shown",
    ]
    assert "EUR 419.5" in found[3]["cards"][0]
    assert "EUR 413.5" in found[4]["cards"][0]


def test_a_page_that_keeps_people_from_reading_it_is_found(seen: list[Seen]) -> None:
    phone, _ = (one for one in seen if one.name == "broken")
    rules = {each["rule"] for each in phone.violations}
    assert {"html-has-lang", "color-contrast", "heading-order", "landmark-one-main"} <= rules
    assert phone.widest > PHONE
