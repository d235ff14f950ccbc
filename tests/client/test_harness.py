"""What the harness asks of a model becomes calls, and its results become messages; no model is there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance

from luthier.client import Client
from luthier.client.harness import LuthierLM, arm_result, run_tasks
from luthier.client.scores import estimate_words
from luthier.errors import InvalidArgument
from luthier.v1.evaluation_pb2 import (
    FINISH_REASON_STOP,
    SCORE_DIRECTION_HIGHER_IS_BETTER,
    SCORE_DIRECTION_LOWER_IS_BETTER,
    SCORE_KIND_FRACTION,
    SCORE_KIND_REAL,
)
from luthier.v1.evaluation_service_pb2 import GenerateTextResponse, ScoreTextsResponse
from luthier.v1.text_score_pb2 import TextScore


def instances(kind: Any, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=one, idx=index) for index, one in enumerate(arguments)
    ]


def test_texts_go_in_calls_of_bounded_size_and_come_back_in_order(services: Any, client: Client) -> None:
    seen: list[Any] = []

    def score(request: Any, context: Any) -> ScoreTextsResponse:
        seen.append(request)
        return ScoreTextsResponse(
            scores=[
                TextScore(log_probability=-float(len(text.continuation)), is_greedy=text.context == "even")
                for text in request.texts
            ]
        )

    services.answers["ScoreTexts"] = score
    asked = [("even" if number % 2 == 0 else "odd ", "x" * number) for number in range(1, 41)]
    found = LuthierLM("m", client=client).loglikelihood(instances("loglikelihood", *asked))
    # White space at the end of a context is the continuation's.
    assert found == [
        (-float(number if number % 2 == 0 else number + 1), number % 2 == 0) for number in range(1, 41)
    ]
    assert {request.model for request in seen} == {"projects/default/models/m"}
    assert all(len(request.texts) <= 16 for request in seen)
    long = instances("loglikelihood_rolling", *[("y" * 20_000,)] * 3)
    seen.clear()
    assert LuthierLM("m", client=client).loglikelihood_rolling(long) == [-20_000.0] * 3
    assert [len(request.texts) for request in seen] == [1, 1, 1]
    assert all(text.rolling for request in seen for text in request.texts)


def test_an_answer_ends_before_the_first_of_its_stops(services: Any, client: Client) -> None:
    seen: list[Any] = []

    def generate(request: Any, context: Any) -> Iterator[GenerateTextResponse]:
        seen.append(request)
        for text in ("one\n", "\ntwo ST", "OP three"):
            yield GenerateTextResponse(text=text)
        yield GenerateTextResponse(finish_reason=FINISH_REASON_STOP)

    services.answers["GenerateText"] = generate
    model = LuthierLM("m", client=client)
    turns = model.apply_chat_template([{"role": "user", "content": "hi"}])
    asked = instances(
        "generate_until",
        ("a", {"until": ["STOP", "four"], "max_gen_toks": 7, "do_sample": False, "temperature": 0.0}),
        ("b", {"until": ["STOP", "\n\n"]}),
        ("c", {"until": "zz", "do_sample": True, "temperature": 0.5, "top_p": 0.9, "seed": 3}),
        (turns, {}),
    )
    assert model.generate_until(asked) == [
        "one\n\ntwo ",
        "one",
        "one\n\ntwo STOP three",
        "one\n\ntwo STOP three",
    ]
    by_prompt = {request.prompt: request for request in seen}
    assert (by_prompt["a"].max_new_tokens, by_prompt["a"].temperature) == (7, 0.0)
    assert by_prompt["b"].max_new_tokens == 256
    assert (by_prompt["c"].temperature, by_prompt["c"].top_p, by_prompt["c"].seed) == (0.5, 0.9, 3)
    assert [turn.content for turn in by_prompt[""].conversation.messages] == ["hi"]


def test_results_become_scores_with_intervals() -> None:
    results = {
        "results": {
            "t": {
                "alias": "t",
                "acc,none": 0.9,
                "acc_stderr,none": 0.1,
                "exact_match,strict": 0.25,
                "exact_match_stderr,strict": "N/A",
                "word_perplexity,none": 12.5,
                "word_perplexity_stderr,none": "N/A",
            }
        },
        "n-samples": {"t": {"original": 100, "effective": 40}},
        "higher_is_better": {"t": {"acc": True, "exact_match": True, "word_perplexity": False}},
    }
    found = arm_result("tuned", results)
    assert found.arm_id == "tuned"
    acc, strict, perplexity = found.scores
    assert (acc.score, acc.value, acc.count, acc.kind) == ("lm_eval.t.acc", 0.9, 40, SCORE_KIND_FRACTION)
    assert 0.70 < acc.lower < 0.71
    assert acc.upper == 1.0, "a share is at most 1"
    assert (strict.score, strict.lower, strict.upper) == ("lm_eval.t.exact_match.strict", 0.0, 0.0)
    assert (perplexity.score, perplexity.kind) == ("lm_eval.t.word_perplexity", SCORE_KIND_REAL)
    assert perplexity.direction == SCORE_DIRECTION_LOWER_IS_BETTER
    assert acc.direction == SCORE_DIRECTION_HIGHER_IS_BETTER


def test_what_is_no_share_is_not_clipped_and_what_has_no_error_has_no_bounds() -> None:
    found = {
        one.score: one
        for one in arm_result(
            "tuned",
            {
                "results": {
                    "t": {
                        "mcc,none": -0.4,
                        "mcc_stderr,none": 0.1,
                        "f1,none": 87.5,
                        "f1_stderr,none": 2.0,
                        "brier_score,none": 1.1,
                        "brier_score_stderr,none": float("nan"),
                        "acc,none": 0.5,
                        "acc_norm,percent": 50.0,
                        "acc_norm_stderr,percent": 30.0,
                    }
                },
                "n-samples": {"t": {"effective": 40}},
                "higher_is_better": {"t": {"brier_score": False}},
            },
        ).scores
    }
    mcc, f1, percent = (found[f"lm_eval.t.{name}"] for name in ("mcc", "f1", "acc_norm.percent"))
    assert (mcc.lower, mcc.upper) == pytest.approx((-0.596, -0.204), abs=1e-3)
    assert (f1.lower, f1.upper) == pytest.approx((83.58, 91.42), abs=1e-2)
    assert percent.upper > 100
    assert {one.kind for one in (mcc, f1, percent)} == {SCORE_KIND_REAL}
    for name in ("acc", "brier_score"):
        assert (found[f"lm_eval.t.{name}"].lower, found[f"lm_eval.t.{name}"].upper) == (0.0, 0.0)
    assert estimate_words(found["lm_eval.t.acc"]) == "50.0 %"
    assert estimate_words(found["lm_eval.t.brier_score"]) == "1.1"
    assert estimate_words(mcc) == "-0.4 [-0.596, -0.204]"


def test_likelihoods_of_turns_are_refused(services: Any, client: Client, tmp_path: Path) -> None:
    """A task of choices run in turns must not score the mark that stands for turns."""
    services.answers["ScoreTexts"] = lambda request, context: ScoreTextsResponse(
        scores=[TextScore() for _ in request.texts]
    )
    (tmp_path / "choices.jsonl").write_text('{"q": "which?", "a": 0}\n')
    task = {
        "task": "choices",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "choices.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": ["red", "green"],
        "doc_to_target": "{{a}}",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "choices.yaml").write_text(json.dumps(task))
    model = LuthierLM("m", client=client)
    assert run_tasks(model, ["choices"], folders=[tmp_path])["results"]["choices"]
    with pytest.raises(InvalidArgument, match=r"must be of tasks that generate.*got 'luthier-turns:"):
        run_tasks(model, ["choices"], folders=[tmp_path], chat=True)
