"""`luthier evaluations grade`, and the SDK's `grade`, against fake services."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import Result

from luthier.client import AsyncClient, Client
from luthier.errors import DataLoss
from luthier.v1.evaluation_service_pb2 import GradeSamplesRequest, GradeSamplesResponse
from luthier.v1.grader_pb2 import Grader, Sample, SampleGrade, StringCheckGrader

Run = Callable[..., Result]
GRADER = """
name: right
multi:
  graders:
    same:
      string_check: {input: "{{sample.output_text}}", reference: "{{item.answer}}", operation: eq}
    close:
      text_similarity: {input: "{{sample.output_text}}", reference: "{{item.answer}}", evaluation_metric: rouge_l}
  calculate_output: 0.8 * same + 0.2 * close
"""


class Grading:
    """Answers GradeSamples two samples at a time; texts that begin with `bad` are errors."""

    def __init__(self) -> None:
        self.requests: list[GradeSamplesRequest] = []
        self.breaks_after: int | None = None

    def __call__(self, request: GradeSamplesRequest, context: Any) -> Iterator[GradeSamplesResponse]:
        self.requests.append(request)
        for start in range(0, len(request.samples), 2):
            if self.breaks_after == start:
                self.breaks_after = None
                context.abort(grpc.StatusCode.UNAVAILABLE, "away")
            yield GradeSamplesResponse(grades=map(self.grade, request.samples[start : start + 2]))

    def grade(self, sample: Sample) -> SampleGrade:
        grade = SampleGrade(part_scores={"same": 1.0})
        if sample.output_text.startswith("bad"):
            grade.error.message = "no field 'answer'"
        else:
            grade.score = len(sample.output_text) / 1000
        return grade


@pytest.fixture
def grading(services: Any) -> Grading:
    made = Grading()
    services.answers["GradeSamples"] = made
    return made


def files(tmp_path: Path, *samples: Any) -> list[str]:
    (tmp_path / "grader.yaml").write_text(GRADER)
    lines = (one if isinstance(one, str) else json.dumps(one) for one in samples)
    (tmp_path / "samples.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return ["-f", str(tmp_path / "grader.yaml"), "--samples", str(tmp_path / "samples.jsonl")]


def test_grade_shows_scores_parts_and_errors(grading: Grading, run: Run, tmp_path: Path) -> None:
    samples = [
        {"item": {"answer": "é"}, "output_text": "abc"},
        {"output_text": "bad"},
        {"output_text": "abcde", "is_truncated": True},
    ]
    result = run("evaluations", "grade", *files(tmp_path, *samples))
    assert result.exit_code == 0, result.output
    assert re.search(r"SAMPLE +SCORE +same +ERROR", result.stdout)
    assert re.search(r"0 +0\.003 +1", result.stdout)
    assert re.search(r"1 +1 +no field 'answer'", result.stdout)
    assert "mean 0.004 of 2 scores" in result.stderr
    assert "1 of 3 samples could not be graded" in result.stderr
    (request,) = grading.requests
    assert request.parent == "projects/default"
    assert request.grader.multi.graders["same"].string_check.operation == StringCheckGrader.OPERATION_EQ
    assert request.grader.multi.calculate_output == "0.8 * same + 0.2 * close"
    assert json.loads(request.samples[0].item_json) == {"answer": "é"}
    assert request.samples[1] == Sample(item_json="{}", output_text="bad")
    assert request.samples[2] == Sample(item_json="{}", output_text="abcde", is_truncated=True)


def test_grade_writes_json_and_reads_stdin(grading: Grading, run: Run, tmp_path: Path) -> None:
    words = files(tmp_path)[:2]
    result = run("evaluations", "grade", "--json", *words, "--samples", "-", stdin='{"output_text": "a"}\n\n')
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == [{"score": 0.001, "part_scores": {"same": 1.0}}]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "samples.jsonl:2: must be a JSON object on one line"),
        ("[1]", "samples.jsonl:2: must be a JSON object on one line"),
        ({"item": 1, "output_text": "a"}, "samples.jsonl:2: item must be an object and output_text a text"),
        ({"output_text": "a", "is_truncated": 1}, "samples.jsonl:2: is_truncated must be true or false"),
        ({"item": {}}, "samples.jsonl:2: item must be an object and output_text a text"),
        ({"output": "a"}, "samples.jsonl:2: must hold item, output_text, is_truncated alone, got output"),
        ('{"output_text": "\\ud800"}', "samples.jsonl:2: must be Unicode text"),
    ],
)
def test_grade_names_the_line_that_is_wrong(
    grading: Grading, run: Run, tmp_path: Path, line: Any, said: str
) -> None:
    result = run("evaluations", "grade", *files(tmp_path, {"output_text": "a"}, line))
    assert result.exit_code == 2
    assert said in result.stderr


def test_grade_names_the_field_that_is_wrong(run: Run, tmp_path: Path) -> None:
    words = files(tmp_path, {"output_text": "a"})
    (tmp_path / "grader.yaml").write_text("string_check: {input: a, operation: equals}\n")
    result = run("evaluations", "grade", *words)
    assert result.exit_code == 2
    assert "grader.yaml:1: string_check.operation must be one of EQ, NE, LIKE, ILIKE" in result.stderr


def test_any_number_of_samples_is_sent_in_calls_that_a_service_takes(
    grading: Grading, client: Client
) -> None:
    samples = [Sample(output_text="x" * (number % 7)) for number in range(600)]
    grades = list(client.evaluations.grade(Grader(name="g"), samples))
    assert [grade.score for grade in grades] == [len(one.output_text) / 1000 for one in samples]
    assert [len(request.samples) for request in grading.requests] == [256, 256, 88]
    grading.requests.clear()
    large = [Sample(output_text="x" * (1 << 20))] * 5
    assert len(list(client.evaluations.grade(Grader(name="g"), large))) == 5
    assert [len(request.samples) for request in grading.requests] == [2, 2, 1]
    assert list(client.evaluations.grade(Grader(name="g"), [])) == []


def test_a_stream_that_breaks_goes_on_where_it_was(grading: Grading, client: Client) -> None:
    grading.breaks_after = 4
    samples = [Sample(output_text="x" * number) for number in range(9)]
    grades = list(client.evaluations.grade(Grader(), samples))
    assert [round(grade.score * 1000) for grade in grades] == list(range(9))
    assert [len(request.samples) for request in grading.requests] == [9, 5]


async def test_the_async_client_does_the_same(grading: Grading, async_client: AsyncClient) -> None:
    samples = [Sample(output_text="x" * number) for number in range(300)]
    grades = [grade async for grade in async_client.evaluations.grade(Grader(), samples)]
    assert [round(grade.score * 1000) for grade in grades] == list(range(300))


@pytest.mark.parametrize("count", [0, 3])
def test_a_wrong_number_of_grades_is_never_taken(services: Any, client: Client, count: int) -> None:
    answer = GradeSamplesResponse(grades=[SampleGrade(score=1.0)] * count)
    services.answers["GradeSamples"] = lambda request, context: iter([answer])
    with pytest.raises(DataLoss, match="did not grade 2 of 2 samples"):
        list(client.evaluations.grade(Grader(), [Sample(), Sample()]))
