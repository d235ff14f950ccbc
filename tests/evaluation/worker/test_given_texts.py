"""What arms find of given texts, and what they cost: choices, pairs, bits per byte, beside models asked directly."""

from __future__ import annotations

import json
import math
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from luthier.errors import InvalidArgument, Reason
from luthier.errors.status import status_to_failure
from luthier.lm.load import load_model
from luthier.lm.scoring import sequence_logprobs
from luthier.text.records import ChatPair, ChatRecord, Message, SingleRecord
from luthier.text.rendering import Renderer
from luthier.text.tokenizer import TokenizerBundle
from luthier.text.units import chosen_record, rejected_record, with_text
from luthier.v1 import evaluation_pb2 as api
from luthier.v1.evaluation_pb2 import EvaluationMetric

ARMS = [("zero", "base", 0), ("few", "base", 1), ("tuned", "tuned", 0)]
COLOURS = ("blue", "dark green", "red")


def metric(name: str) -> EvaluationMetric.ValueType:
    return EvaluationMetric.Value(f"EVALUATION_METRIC_{name}")


def asked(number: int, answer: str) -> ChatRecord:
    return ChatRecord(
        messages=(
            Message(role="user", content=f"what colour has thing {number}?"),
            Message(role="assistant", content=answer),
        )
    )


def pair(number: int) -> ChatPair:
    def side(text: str) -> tuple[Message, ...]:
        return (Message(role="assistant", content=text),)

    question = Message(role="user", content=f"what colour has thing {number}?")
    return ChatPair(
        messages=(question,), chosen=side(f"it is {number}"), rejected=side("no" * (number % 4 + 1))
    )


def logprob(folder: Path, record: SingleRecord, *, with_ending: bool = True) -> float:
    """Without batches, engine or service."""
    model, renderer = load_model(folder), Renderer(TokenizerBundle.load(folder), today=date.today())
    text = renderer.answer(record)
    mask = [
        learnt and (with_ending or token not in text.ending_ids)
        for token, learnt in zip(text.input_ids, text.loss_mask, strict=True)
    ]
    (score,) = sequence_logprobs(model, [text.input_ids], [mask])
    return score.logprob


async def run(site: Any, *names: str, **fields: Any) -> api.Evaluation:
    wanted = {"arms": ARMS, "metrics": [metric(name) for name in names], "max_new_tokens": 4, **fields}
    async with site.worker():
        done: api.Evaluation = await site.ended((await site.evaluate(**wanted)).name)
    return done


def value(done: api.Evaluation, arm: str, score: str) -> float:
    (result,) = (one for one in done.arm_results if one.arm_id == arm)
    return next(one.value for one in result.scores if one.score == score)


async def test_the_likeliest_choice_is_chosen(site: Any, model_folders: dict[str, Path]) -> None:
    site.data.records["TEST"] = records = [asked(number, COLOURS[number % 3]) for number in range(12)]
    done = await run(site, "MULTIPLE_CHOICE")
    assert done.state == api.Evaluation.STATE_SUCCEEDED, done.error
    sums = [
        [logprob(model_folders["base"], with_text(one, text), with_ending=False) for text in COLOURS]
        for one in records
    ]
    right = [max(range(3), key=found.__getitem__) == number % 3 for number, found in enumerate(sums)]
    shares = [[found[at] / len(COLOURS[at]) for at in range(3)] for found in sums]
    means = [max(range(3), key=found.__getitem__) == number % 3 for number, found in enumerate(shares)]
    assert value(done, "zero", "multiple_choice.accuracy") == sum(right) / 12
    assert value(done, "zero", "multiple_choice.accuracy_norm") == sum(means) / 12
    assert 0 < sum(right) < 12, "the test says something"
    assert done.primary_score == "multiple_choice.accuracy"
    assert {one.score for one in done.comparisons} == {
        "multiple_choice.accuracy",
        "multiple_choice.accuracy_norm",
    }


async def test_choices_that_are_named_are_those(site: Any) -> None:
    site.data.records["TEST"] = [asked(number, COLOURS[number % 3]) for number in range(3)]
    done = await run(site, "MULTIPLE_CHOICE", choices=[*COLOURS, "white"])
    assert done.state == api.Evaluation.STATE_SUCCEEDED, done.error
    done = await run(site, "MULTIPLE_CHOICE", choices=["red", "white"])
    assert done.error.message == (
        "test.jsonl:1: the reference must be one of the choices 'red', 'white', got 'blue'"
    )


async def test_too_many_different_references_are_no_choice(site: Any) -> None:
    site.data.records["TEST"] = [asked(number, f"colour {number}") for number in range(65)]
    done = await run(site, "MULTIPLE_CHOICE", arms=ARMS[:1])
    assert (
        "must have 2 to 64 texts to choose between, none of them empty, the references have 65"
        in done.error.message
    )
    assert site.models.downloads == 0


async def test_of_pairs_the_chosen_side_is_held_against_the_rejected_one(
    site: Any, model_folders: dict[str, Path]
) -> None:
    site.data.records["TEST"] = pairs = [pair(number) for number in range(12)]
    done = await run(site, "PREFERENCE", "BITS_PER_BYTE")
    assert done.state == api.Evaluation.STATE_SUCCEEDED, done.error
    folder = model_folders["base"]
    chosen = [logprob(folder, chosen_record(one)) for one in pairs]
    rejected = [logprob(folder, rejected_record(one)) for one in pairs]
    margins = [one - other for one, other in zip(chosen, rejected, strict=True)]
    assert value(done, "zero", "preference.margin") == pytest.approx(sum(margins) / 12, rel=0.02)
    assert value(done, "zero", "preference.accuracy") == sum(margin > 0 for margin in margins) / 12
    sizes = [len(one.chosen[-1].content.encode()) for one in pairs]
    bits = -sum(chosen) / math.log(2) / sum(sizes)
    assert value(done, "zero", "bits_per_byte") == pytest.approx(bits, rel=0.02)
    rows = await site.predictions(done.name)
    found = [
        answer.scores["preference.margin"]
        for row in rows
        for answer in row.answers
        if answer.arm_id == "zero"
    ]
    assert found == pytest.approx(margins, rel=0.1, abs=0.5)
    apart = {one.score: one for one in done.comparisons if one.candidate_arm_id == "tuned"}
    assert apart["bits_per_byte"].method == api.COMPARISON_METHOD_STUDENT
    assert apart["preference.accuracy"].method == api.COMPARISON_METHOD_SCORE_TEST


async def test_a_record_with_one_answer_has_no_preference(site: Any) -> None:
    done = await run(site, "PREFERENCE")
    assert status_to_failure(done.error).reason == Reason.INVALID_RECORDS
    assert done.error.message == (
        "test.jsonl:1: PREFERENCE compares the two answers of a preference pair, this record has one answer; leave the "
        "metric out, or evaluate a version of pairs"
    )
    assert site.models.downloads == 0


async def test_what_an_answer_costs_is_told_by_arm(site: Any) -> None:
    done = await run(site, "ANSWER_LENGTH", "STOP_RATE", "PROMPT_TOKENS", "CHRF")
    results = {one.arm_id: one for one in done.arm_results}
    for arm, result in results.items():
        assert value(done, arm, "answer_length") == result.num_generated_tokens / 12
        assert value(done, arm, "stop_rate") == 1 - result.num_cut / 12
        assert result.tokens_per_second > 0
    # Every prompt whole, though what all begin with is read once.
    assert value(done, "few", "prompt_tokens") * 12 > results["few"].num_prompt_tokens
    assert value(done, "few", "prompt_tokens") > value(done, "zero", "prompt_tokens") + 10
    assert 0 <= value(done, "zero", "chrf") < 1


async def test_nobody_chose_metrics_and_exact_match_cannot_tell_arms_apart(site: Any) -> None:
    done = await run(site)
    assert [EvaluationMetric.Name(one) for one in done.metrics] == [
        "EVALUATION_METRIC_EXACT_MATCH",
        "EVALUATION_METRIC_PERPLEXITY",
    ]
    assert done.primary_score == "exact_match"
    (blind,) = (text for text in done.warnings if "cannot tell arms apart" in text)
    assert blind.startswith("exact_match is 0.0 % for each of 3 arms: where all answers are wrong it cannot")
    assert done.verdict.sentence.startswith("Inconclusive: exact_match is 0.0 % for each of 3 arms")
    assert done.verdict.sentence.endswith("choose another primary_score.")
    assert done.verdict.num_records_to_settle == 0


async def test_order_of_arms_and_a_lost_attempt_change_nothing(site: Any) -> None:
    site.data.records["TEST"] = [pair(number) for number in range(70)]
    wanted = ("PREFERENCE", "PROMPT_TOKENS")
    first = await run(site, *wanted, arms=ARMS[1:])
    second = await run(site, *wanted, arms=ARMS[:0:-1])
    told = [
        {
            (row.row, answer.arm_id): json.dumps(dict(answer.scores), sort_keys=True)
            for row in await site.predictions(done.name)
            for answer in row.answers
        }
        for done in (first, second)
    ]
    assert told[0] == told[1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"choices": ["a", "b"]}, "must be empty without the metric MULTIPLE_CHOICE, got 2"),
        ({"metrics": [metric("MULTIPLE_CHOICE")], "choices": ["a"]}, "must be at least 2 choices, got 1"),
        ({"metrics": [metric("MULTIPLE_CHOICE")], "choices": ["a", " a"]}, "must differ, .* got 'a' 2 times"),
        (
            {"metrics": [metric("MULTIPLE_CHOICE")], "choices": ["a", " "]},
            r"choices\[1\]: must have a text, got ' '",
        ),
    ],
)
async def test_choices_that_can_never_be_right_are_refused(
    site: Any, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidArgument, match=message) as caught:
        await site.evaluate(**fields)
    assert caught.value.reason == Reason.INVALID_FIELD
