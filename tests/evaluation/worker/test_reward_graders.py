"""Reward models as graders: of an evaluation, of given samples and of a reinforcement job, with the same scores."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from tests.evaluation.conftest import Site
from tests.evaluation.peer_servers import thing
from tests.evaluation.tiny_models import TEMPLATE, write_base, write_tokenizer
from tests.evaluation.worker.test_graders import ARMS, RECORDS, VOWEL, JobDesk, run, tried
from tokenizers import Tokenizer

from luthier.errors import (
    FailedPrecondition,
    InvalidArgument,
    LuthierError,
    NotFound,
    Reason,
    Unavailable,
)
from luthier.errors.status import status_to_failure
from luthier.evaluation import shares
from luthier.lm.adapter_files import load_reward_adapter
from luthier.lm.generate import FinishReason
from luthier.lm.load import load_model
from luthier.text.records import record_to_json
from luthier.training.recipes.rollouts import Rollout
from luthier.training.recipes.valuing import Valuer
from luthier.training.worker.reward_models import LoadedRewardModel, judges_of
from luthier.training.worker.rollouts import JobRollouts, Records, asking_texts
from luthier.v1.evaluation_pb2 import (
    EVALUATION_METRIC_EXACT_MATCH,
    EVALUATION_METRIC_REWARD_MODEL,
    FINISH_REASON_STOP,
    SCORE_KIND_REAL,
    ArmPrediction,
    Prediction,
)
from luthier.v1.grader_pb2 import Grader, MultiGrader, RewardModelGrader, Sample, ScoreRange
from luthier.v1.model_pb2 import Model, Taught

JUDGE = f"{Site.PARENT}/models/tuned-judge"
VALUED = Grader(name="valued", reward_model=RewardModelGrader(model=JUDGE))
INNER = MultiGrader(
    graders={"deep": VALUED, "vowel": VOWEL},
    calculate_output="deep + 100 * vowel",
    range=ScoreRange(min=-1000, max=1000),
)
WITHIN = Grader(name="within", multi=INNER)
END = 2
"""The token <|im_end|>."""


def samples_of(rows: Sequence[Prediction]) -> list[Sample]:
    """The answers of an evaluation as they are tried."""
    return [
        Sample(
            item_json=record_to_json(thing(row.row)),
            output_text=answer.text,
            is_truncated=is_cut(answer),
        )
        for row in rows
        for answer in row.answers
    ]


def is_cut(answer: ArmPrediction) -> bool:
    return answer.finish_reason != FINISH_REASON_STOP


def rewarded(site: Site, folder: Path, grader: Grader, samples: Sequence[Sample]) -> list[float | None]:
    """What a reinforcement job makes of answers that it drew as the tokens that their texts make."""
    base = site.models.folders["base"]
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    model = load_model(base)
    _, head = load_reward_adapter(model, site.models.folders["tuned-judge"], "judge")
    loaded = LoadedRewardModel(
        name=JUDGE,
        valuer=Valuer(model=model, head=head, adapter="judge"),
        taught=site.models.taught["tuned-judge"],
    )
    records = Records()
    columns = {"row": np.arange(len(samples)), "record": [one.item_json for one in samples]}
    records.add(pyarrow.RecordBatch.from_pydict({name: pyarrow.array(c) for name, c in columns.items()}))
    drawn = [drawn_as(tokenizer, row, sample) for row, sample in enumerate(samples)]
    desk: Any = JobDesk(folder, grader)
    with asking_texts(base, lambda: None) as ask:
        judges = judges_of([loaded], ask, frozenset({END}), 1)
        job = JobRollouts(desk, records, lambda ids, _: tokenizer.decode(list(ids)), frozenset({END}), judges)
        return [reward.score for reward in job.graded(drawn, "TRAIN", 10_000)]


def drawn_as(tokenizer: Tokenizer, row: int, sample: Sample) -> Rollout:
    question = thing_of(sample)
    prompt = tokenizer.encode(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n").ids
    token_ids = tuple(tokenizer.encode(sample.output_text).ids)
    token_ids += () if sample.is_truncated else (END,)
    return Rollout(
        group=row,
        sample=0,
        row=row,
        prompt=tuple(prompt),
        token_ids=token_ids,
        logprobs=(-1.0,) * len(token_ids),
        finish_reason=FinishReason.LENGTH if sample.is_truncated else FinishReason.STOP,
    )


def thing_of(sample: Sample) -> str:
    number = next(number for number in range(RECORDS) if record_to_json(thing(number)) == sample.item_json)
    return thing(number).messages[0].content


@pytest.fixture
def taught(judged: Site) -> Site:
    judged.models.taught["tuned-judge"] = Taught(
        chat_template=TEMPLATE,
        template_date=datetime.now(UTC).date().isoformat(),
        stop_token_ids=[END],
    )
    return judged


async def test_an_evaluation_a_job_and_a_trial_value_the_same_answer_alike(
    taught: Site, tmp_path: Path
) -> None:
    done = await run(
        taught,
        VALUED,
        WITHIN,
        metrics=[EVALUATION_METRIC_EXACT_MATCH, EVALUATION_METRIC_REWARD_MODEL],
        reward_model=JUDGE,
        max_new_tokens=24,
    )
    rows = await taught.predictions(done.name)
    samples = samples_of(rows)
    # Tiny models hardly ever end an answer: half of the same texts are tried as ended ones.
    ended = [Sample(item_json=one.item_json, output_text=one.output_text) for one in samples[::2]]
    async with taught.worker():
        for grader in (VALUED, WITHIN):
            grades = [answer.grades[grader.name] for row in rows for answer in row.answers]
            assert all(one.HasField("score") for one in grades)
            assert len({one.score for one in grades}) > 12
            assert grades == await tried(taught, grader, samples)
            of_ended = [one.score for one in await tried(taught, grader, ended)]
            wanted = rewarded(taught, tmp_path, grader, [*samples, *ended])
            assert [*(one.score for one in grades), *of_ended] == pytest.approx(wanted, rel=1e-3, abs=1e-3)
            of_cut = zip(of_ended, grades[::2], samples[::2], strict=True)
            assert all(score != grade.score for score, grade, one in of_cut if one.is_truncated)
    assert [grade.part_scores["deep"] for grade in grades] == [
        answer.grades["valued"].score for row in rows for answer in row.answers
    ]
    for answer in (answer for row in rows for answer in row.answers):
        assert answer.scores["reward"] == answer.scores["grader.valued"] == answer.grades["valued"].score
    assert [(one.name, one.num_errors) for one in done.grader_results] == [("valued", 0), ("within", 0)]
    kinds = {one.kind for arm in done.arm_results for one in arm.scores if one.score == "grader.valued"}
    assert kinds == {SCORE_KIND_REAL}
    assert {one.name.rpartition("/")[2] for one in done.references} >= {"tuned-judge", "base"}


async def test_arms_of_any_tokenizer_are_valued_by_the_models_own(judged: Site, tmp_path: Path) -> None:
    write_base(tmp_path / "alien", 9)
    write_tokenizer(tmp_path / "alien", "quite some other words of another world")
    judged.models.folders["alien"] = tmp_path / "alien"
    done = await run(judged, VALUED, arms=[("zero", "base", 0), ("alien", "alien", 0)])
    rows = await judged.predictions(done.name)
    assert len({answer.grades["valued"].score for row in rows for answer in row.answers}) > 12
    async with judged.worker():
        assert [answer.grades["valued"] for row in rows for answer in row.answers] == await tried(
            judged, VALUED, samples_of(rows)
        )


async def test_what_has_no_value_is_an_error_of_its_answer(judged: Site) -> None:
    judged.models.context_lengths["base"] = 64
    samples = [
        Sample(item_json='{"prompt": "one and one is "}', output_text="two"),
        Sample(item_json='{"answer": 4}', output_text="4"),
        Sample(item_json='{"prompt": "one and one is "}', output_text="two, " * 40),
        Sample(item_json='{"messages": [{"role": "user", "content": "?"}]}', output_text="two"),
    ]
    async with judged.worker():
        grades = await tried(judged, VALUED, samples)
    assert [one.HasField("score") for one in grades] == [True, False, False, True]
    failures = [status_to_failure(one.error) for one in grades[1:3]]
    assert [one.reason for one in failures] == [Reason.GRADER_INPUT_INVALID, Reason.SEQUENCE_TOO_LONG]
    assert failures[0].message.startswith(
        "grader valued: to be valued the record must be one that asks, as those of dataset versions do: it must have"
    )
    assert (
        "must have at most the 64 tokens that projects/default/models/tuned-judge reads"
        in failures[1].message
    )


async def test_many_samples_are_valued_in_orders_of_their_size(judged: Site) -> None:
    samples = [
        Sample(item_json='{"prompt": "one and one is "}', output_text=f"{number % 7}")
        for number in range(150)
    ]
    async with judged.worker():
        grades = await tried(judged, VALUED, samples)
    assert len(grades) == 150
    by_text: dict[str, set[float]] = {}
    for sample, grade in zip(samples, grades, strict=True):
        by_text.setdefault(sample.output_text, set()).add(grade.score)
    assert {len(one) for one in by_text.values()} == {1}, "the same bits whatever else is valued"


async def test_values_are_the_same_whoever_answers_and_in_whatever_order(
    judged: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shares, "ROWS_A_BATCH", 4)
    alone = await run(judged, VALUED)
    dealt = await run(judged, VALUED, arms=ARMS[::-1], max_workers=2)
    told = [
        {
            (row.row, one.arm_id): one.grades["valued"].score
            for row in await judged.predictions(done.name)
            for one in row.answers
        }
        for done in (alone, dealt)
    ]
    assert told[0] == told[1]


CASES: list[tuple[str, type[LuthierError], Reason, str]] = [
    (
        f"{Site.PARENT}/models/base",
        InvalidArgument,
        Reason.REWARD_MODEL_EXPECTED,
        "FIELD.reward_model.model: must be a reward model .* or a checkpoint of one, got '.*/base', of kind BASE",
    ),
    (f"{Site.PARENT}/models/none", NotFound, Reason.RESOURCE_NOT_FOUND, "none does not exist"),
    (
        "projects/other/models/judge",
        InvalidArgument,
        Reason.CROSS_PROJECT_REFERENCE,
        "FIELD.reward_model.model: must be in projects/default",
    ),
    ("judge", InvalidArgument, Reason.INVALID_FIELD, "FIELD.reward_model.model: "),
]


@pytest.mark.parametrize(("name", "kind", "reason", "message"), CASES)
async def test_what_is_no_reward_model_is_refused_with_its_field(
    judged: Site, name: str, kind: type[LuthierError], reason: Reason, message: str
) -> None:
    wrong = Grader(name="wrong", reward_model=RewardModelGrader(model=name))
    multi = MultiGrader(graders={"a": wrong}, calculate_output="a", range=ScoreRange(min=-9, max=9))
    for grader, place in ((wrong, ""), (Grader(name="deep", multi=multi), r"\.multi\.graders\['a'\]")):
        with pytest.raises(kind, match=message.replace("FIELD", f"grader{place}")) as caught:
            await tried(judged, grader, [Sample(item_json="{}", output_text="a")])
        assert caught.value.reason == reason
        field = rf"evaluation\.graders\[1\]{place}"
        with pytest.raises(kind, match=message.replace("FIELD", field)) as caught:
            await judged.evaluate(arms=ARMS, graders=[VOWEL, grader])
        assert caught.value.reason == reason


async def test_more_reward_models_than_are_loaded_for_one_call_are_refused(judged: Site) -> None:
    several = [
        Grader(
            name=f"g{number}", reward_model=RewardModelGrader(model=f"{Site.PARENT}/models/judge-{number}")
        )
        for number in range(9)
    ]
    grader = Grader(
        name="all",
        multi=MultiGrader(graders={one.name: one for one in several}, calculate_output="g0"),
    )
    place = r"multi.graders\['g8'\].reward_model.model: must be one of at most 8 reward models in all, got one more"
    with pytest.raises(InvalidArgument, match=rf"grader\.{place}"):
        await tried(judged, grader, [Sample(item_json="{}", output_text="a")])
    with pytest.raises(InvalidArgument, match=rf"evaluation\.graders\[0\]\.{place}"):
        await judged.evaluate(arms=ARMS, graders=[grader])


async def test_a_reward_model_that_is_not_ready_or_no_worker_is_told(judged: Site) -> None:
    sample = Sample(item_json='{"prompt": "a"}', output_text="b")
    with pytest.raises(Unavailable, match="no evaluation worker takes orders") as caught:
        await tried(judged, VALUED, [sample])
    assert caught.value.reason == Reason.NO_WORKER
    judged.models.states["tuned-judge"] = Model.STATE_FAILED
    with pytest.raises(FailedPrecondition, match="tuned-judge must be READY, it is FAILED"):
        await tried(judged, VALUED, [sample])
