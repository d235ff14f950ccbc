"""Examples that are most like each question: which they are, and that nothing else decides."""

from __future__ import annotations

import random
from typing import Any

import pytest

from luthier.errors import FailedPrecondition, InvalidArgument
from luthier.evaluation.worker.questions import Question
from luthier.evaluation.worker.shots import Similar, require_enough
from luthier.text.records import ChatRecord, CompletionRecord, Message, SingleRecord, record_id
from luthier.v1.evaluation_pb2 import (
    EVALUATION_METRIC_EXACT_MATCH,
    EVALUATION_METRIC_PROMPT_TOKENS,
    SHOT_CHOICE_SIMILAR,
    Evaluation,
    EvaluationArm,
)
from luthier.v1.evaluation_service_pb2 import CreateEvaluationRequest

TOPICS = ["the price of copper", "how bees find flowers", "rules of chess openings", "trains to the north"]


def chat(question: str, answer: str = "answer") -> ChatRecord:
    return ChatRecord(
        messages=(
            Message(role="system", content="Answer about bees."),
            Message(role="user", content=question),
            Message(role="assistant", content=answer),
        )
    )


def question(record: SingleRecord, row: int = 0) -> Question:
    return Question(record_id=record_id(record), row=row, record=record)


def asks(records: Any) -> list[str]:
    return [one.messages[1].content for one in records]


CANDIDATES = [
    question(chat(f"tell me number {number} about {topic}"), number * 10 + at)
    for number in range(5)
    for at, topic in enumerate(TOPICS)
]


@pytest.mark.parametrize("topic", TOPICS)
def test_the_most_similar_stand_before_a_question_the_nearest_last(topic: str) -> None:
    found = asks(Similar(CANDIDATES, 3, 0).shots(3)(question(chat(f"number 4 about {topic}, please"))))
    assert len(found) == 3
    assert all(topic in text for text in found)
    assert found[-1] == f"tell me number 4 about {topic}"


def test_fewer_examples_are_the_nearest_of_more() -> None:
    similar, one = Similar(CANDIDATES, 4, 0), question(chat("number 2 about how bees find flowers"))
    assert asks(similar.shots(2)(one)) == asks(similar.shots(4)(one))[-2:]


def test_the_record_and_what_asks_the_same_is_never_taken() -> None:
    own = "tell me number 1 about rules of chess openings"
    same = [question(chat("  TELL me  number 1 about Rules of chess openings", "other"), 99), *CANDIDATES]
    found = Similar(same, len(CANDIDATES) - 1, 0).shots(len(CANDIDATES) - 1)(question(chat(own, "mine")))
    assert own not in asks(found)
    assert len(found) == len(CANDIDATES) - 1
    assert not [
        text for text in asks(found) if text.strip().casefold().startswith("tell me  number 1 about rules")
    ]


def test_two_candidates_that_ask_the_same_are_one() -> None:
    twice = [question(chat("about trains", str(number)), number) for number in range(3)]
    with pytest.raises(
        FailedPrecondition, match=r"an arm wants 2 similar examples, the 3 records .* have 1 that"
    ):
        Similar(twice, 2, 0).shots(2)(question(chat("which trains?")))


def test_the_order_of_candidates_and_of_questions_decides_nothing() -> None:
    questions = [question(chat(f"say {number} about {TOPICS[number % 4]}"), number) for number in range(12)]
    shuffled = random.Random(1).sample(CANDIDATES, len(CANDIDATES))
    one, other = Similar(CANDIDATES, 4, 7).shots(4), Similar(shuffled, 4, 7).shots(4)
    forwards = [asks(one(each)) for each in questions]
    assert [asks(other(each)) for each in reversed(questions)] == forwards[::-1]


def test_what_nothing_is_like_gets_examples_by_the_seed() -> None:
    nothing = question(chat("\u2026"))
    found = {tuple(asks(Similar(CANDIDATES, 2, seed).shots(2)(nothing))) for seed in range(8)}
    assert len(found) > 1


def test_scripts_without_spaces_are_compared_by_their_signs() -> None:
    candidates = [
        question(chat(text), row)
        for row, text in enumerate(["\u94dc\u7684\u4ef7\u683c", "\u871c\u8702\u5982\u4f55\u627e\u82b1"])
    ]
    (found,) = Similar(candidates, 1, 0).shots(1)(question(chat("\u94dc\u4ef7\u662f\u591a\u5c11")))
    assert asks([found]) == ["\u94dc\u7684\u4ef7\u683c"]


def test_plain_text_stands_before_plain_text_alone() -> None:
    plain = question(CompletionRecord(prompt="number 1 about trains to the north", completion="x"), 500)
    (found,) = Similar([*CANDIDATES, plain], 1, 0).shots(1)(
        question(CompletionRecord(prompt="bees", completion="y"))
    )
    assert found == plain.record


def test_too_few_records_are_refused() -> None:
    with pytest.raises(FailedPrecondition, match="an arm wants 9 examples, the train split has 8 records"):
        require_enough([EvaluationArm(num_shots=9)], 8)


async def evaluated(site: Any, arms: list[EvaluationArm], **fields: Any) -> Evaluation:
    for arm in arms:
        arm.model = f"{site.PARENT}/models/base"
    request = CreateEvaluationRequest(parent=site.PARENT)
    request.evaluation.CopyFrom(
        Evaluation(
            dataset_version=site.VERSION,
            arms=arms,
            max_new_tokens=6,
            metrics=[EVALUATION_METRIC_EXACT_MATCH, EVALUATION_METRIC_PROMPT_TOKENS],
            **fields,
        )
    )
    return await site.call("CreateEvaluation", request)  # type: ignore[no-any-return]


async def test_arms_are_given_them_by_a_worker_whatever_the_order_of_arms(site: Any) -> None:
    """Also where the asked split is the train split itself: its records are candidates for one another."""

    def arms() -> list[EvaluationArm]:
        return [
            EvaluationArm(arm_id="zero"),
            EvaluationArm(arm_id="seed", num_shots=2),
            EvaluationArm(arm_id="alike", num_shots=2, shot_choice=SHOT_CHOICE_SIMILAR),
        ]

    told = []
    async with site.worker():
        for wanted in (arms(), arms()[::-1]):
            done = await site.ended((await evaluated(site, wanted, split=1)).name)
            assert done.state == Evaluation.STATE_SUCCEEDED, done.error
            rows = await site.predictions(done.name)
            told.append({(row.row, answer.arm_id): answer.text for row in rows for answer in row.answers})
    assert told[0] == told[1]
    differ = [row for row, arm in told[0] if arm == "alike" and told[0][row, "alike"] != told[0][row, "seed"]]
    assert differ, "others are chosen than by the seed"
    with pytest.raises(InvalidArgument, match="shot_choice: must be unset without num_shots, got SIMILAR"):
        await evaluated(site, [EvaluationArm(arm_id="zero", shot_choice=SHOT_CHOICE_SIMILAR)])
