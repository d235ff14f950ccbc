"""Evaluations with judges: a process that fails half of the time, models of ours, and workers that are stopped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.evaluation.conftest import JUDGE_KEY, Site
from tests.evaluation.tiny_models import write_base
from tests.evaluation.worker.test_resume import until_answered
from tests.stores import service_file
from tests.work.judge_stub import Stub, judge_stub
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from luthier.errors import Reason, Unavailable
from luthier.evaluation import shares
from luthier.evaluation.worker import judging
from luthier.v1.evaluation_pb2 import Evaluation
from luthier.v1.judge_pb2 import (
    JUDGE_PREFERENCE_FIRST,
    Judge,
    JudgeEndpoint,
    PairwiseJudging,
    RubricJudging,
)
from luthier.work.judge_calls import JudgeCalls

RECORDS = 12
ARMS = [("zero", "base", 0), ("few", "base", 1), ("tuned", "tuned", 0)]
CRITERIA = "the longer"


@pytest.fixture(scope="module")
def stub() -> Iterator[Stub]:
    with judge_stub() as running:
        yield running


def judge(stub: Stub, model: str, judge_id: str = "", **fields: Any) -> Judge:
    endpoint = JudgeEndpoint(url=stub.url, model=model, key="JUDGE_KEY", timeout_seconds=30)
    made = Judge(judge_id=judge_id or model, criteria=CRITERIA, endpoint=endpoint, max_new_tokens=64)
    if "rubric" not in fields:
        fields.setdefault("pairwise", PairwiseJudging())
    made.MergeFrom(Judge(**fields))
    return made


async def run(site: Site, *judges: Judge, **fields: Any) -> Evaluation:
    wanted = {"arms": ARMS, "judges": judges, "max_new_tokens": 6, **fields}
    async with site.worker():
        done = await site.ended((await site.evaluate(**wanted)).name)
    assert done.state == Evaluation.STATE_SUCCEEDED, done.error
    return done


async def test_a_judge_that_fails_half_of_the_time_judges_everything(site: Site, stub: Stub) -> None:
    before = len(stub.seen())
    done = await run(site, judge(stub, "longer-half", "longer"), primary_score="judge.longer")
    (result,) = done.judge_results
    assert (result.num_asked, result.num_errors) == (2 * 2 * RECORDS, 0)
    assert result.num_repeated_calls == len(stub.seen()) - before - result.num_asked
    assert result.num_repeated_calls >= result.num_asked / 3, "about every second call failed"
    assert (result.agreement.value, result.position_bias.value) == (1.0, 0.0)
    rows = await site.predictions(done.name)
    said: dict[str, list[int]] = {arm_id: [] for arm_id, _, _ in ARMS}
    for row in rows:
        for answer in row.answers:
            said[answer.arm_id].append(len(answer.text))
    for pair in result.pairs:
        lengths = list(zip(said["tuned"], said[pair.rival_arm_id], strict=True))
        assert pair.arm_id == "tuned"
        assert pair.num_wins == sum(mine > other for mine, other in lengths)
        assert pair.num_ties == sum(mine == other for mine, other in lengths)
        compared = next(
            one
            for one in done.comparisons
            if one.score == "judge.longer" and one.baseline_arm_id == pair.rival_arm_id
        )
        assert compared.difference == pytest.approx((pair.num_wins - pair.num_losses) / RECORDS)
        assert compared.primary
    assert done.verdict.score == "judge.longer"
    judgements = [one for row in rows for one in row.judgements]
    assert len(judgements) == result.num_asked
    assert all(one.text for one in judgements)


async def test_what_has_no_judgement_is_counted_and_in_no_score(site: Site, stub: Stub) -> None:
    first, babble, eleven, scale = (
        judge(stub, "first"),
        judge(stub, "babble"),
        judge(stub, "eleven", rubric=RubricJudging()),
        judge(stub, "length", rubric=RubricJudging(least=0, most=5)),
    )
    done = await run(site, first, babble, eleven, scale)
    by_id = {one.judge_id: one for one in done.judge_results}
    assert list(by_id) == ["first", "babble", "eleven", "length"]
    assert (by_id["first"].agreement.value, by_id["first"].position_bias.value) == (0.0, 1.0)
    assert all(pair.num_contradictions == RECORDS for pair in by_id["first"].pairs)
    rows = await site.predictions(done.name)
    odd = {
        rival: sum(
            sum(len(answer.text) for answer in row.answers if answer.arm_id in ("tuned", rival)) % 2
            for row in rows
        )
        for rival in ("zero", "few")
    }
    assert {pair.rival_arm_id: pair.num_errors for pair in by_id["babble"].pairs} == odd
    assert by_id["babble"].num_errors == 2 * sum(odd.values()) > 0
    assert [(one.reason, one.count) for one in by_id["babble"].errors] == [
        ("JUDGE_ANSWER_INVALID", by_id["babble"].num_errors)
    ]
    assert by_id["eleven"].num_errors == by_id["eleven"].num_asked == RECORDS * len(ARMS)
    scores = {arm.arm_id: {one.score: one for one in arm.scores} for arm in done.arm_results}
    assert "judge.eleven" not in scores["zero"]
    assert scores["zero"]["judge.babble"].count == RECORDS - odd["zero"]
    for row in rows:
        for answer in row.answers:
            assert answer.scores["judge.length"] == min(len(answer.text) // 10, 5) / 5
    assert [warning.split(" gave no")[0] for warning in done.warnings if "gave no judgement" in warning] == [
        "judge babble",
        "judge eleven",
    ]


async def test_no_key_is_stored_or_told(site: Site, stub: Stub, capfd: pytest.CaptureFixture[str]) -> None:
    done = await run(site, judge(stub, "refuse"), judge(stub, "first"))
    refused = done.judge_results[0]
    assert refused.num_errors == refused.num_asked == 4 * RECORDS
    assert [one.reason for one in refused.errors] == ["JUDGE_REFUSED"]
    assert "no such key: Bearer ***" in refused.errors[0].first_message
    assert JUDGE_KEY in str(stub.seen()[-1]["authorization"])
    assert not [one for one in done.arm_results[0].scores if one.score == "judge.refuse"]
    database = service_file(site.home, "evaluation")
    beside = [path for path in database.parent.glob(f"{database.name}*") if path.is_file()]
    assert database in beside
    files = [*beside, *(path for path in site.home.rglob("*") if path.is_file())]
    assert not [path for path in files if JUDGE_KEY.encode() in path.read_bytes()]
    told = capfd.readouterr()
    assert JUDGE_KEY not in told.out + told.err


async def test_a_key_that_the_worker_has_not_fails_before_any_arm_is_asked(site: Site, stub: Stub) -> None:
    made = judge(stub, "first")
    made.endpoint.key = "OTHER_KEY"
    async with site.worker():
        done = await site.ended((await site.evaluate(arms=ARMS, judges=[made])).name)
    assert done.state == Evaluation.STATE_FAILED
    assert "must be able to read the key 'OTHER_KEY': the variable is not set" in done.error.message
    assert not done.num_records


async def test_a_worker_that_stops_leaves_judgements_to_the_next(
    site: Site, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shares, "ROWS_A_BATCH", 4)
    before = len(stub.seen())
    async with site.worker():
        made = await site.evaluate(arms=ARMS, judges=[judge(stub, "slow")], max_new_tokens=6)
        await until_answered(site, made.name, len(ARMS) * RECORDS + 8)
    first = len(stub.seen()) - before
    async with site.worker():
        done = await site.ended(made.name)
    assert done.state == Evaluation.STATE_SUCCEEDED, done.error
    wanted = done.judge_results[0].num_asked
    assert 8 <= first < wanted
    seen = len(stub.seen()) - before
    assert wanted <= seen <= wanted + 4, "at most the batch that was cut off is asked again"
    assert seen <= done.judge_results[0].num_calls <= seen + 2 * 4, "calls that were taken count as made"


async def test_calls_end_where_the_evaluation_says_and_what_is_left_is_no_score(
    site: Site, stub: Stub
) -> None:
    before = len(stub.seen())
    made = judge(stub, "longer-half", "longer")
    made.endpoint.max_calls = 4 * RECORDS + 5
    done = await run(site, made)
    (result,) = done.judge_results
    assert result.num_calls == len(stub.seen()) - before == 4 * RECORDS + 5
    assert {one.reason for one in result.errors} == {"JUDGE_CALLS_SPENT"}
    assert 0 < result.num_errors < result.num_asked
    assert f"all {4 * RECORDS + 5} calls that the evaluation lets it have" in result.errors[0].first_message
    assert any("JUDGE_CALLS_SPENT" in warning for warning in done.warnings)
    lacking = next(arm for arm in done.arm_results if arm.arm_id == "few")
    assert all(one.count < RECORDS for one in lacking.scores if one.score == "judge.longer")


async def test_lost_attempts_and_shares_spend_of_the_same_calls(
    site: Site, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sleeps through two attempts, which pay for their calls; three workers answer, one of them judges."""
    given_up = []

    class Waking(JudgeCalls):
        def ask(self, *arguments: Any) -> Any:
            try:
                return super().ask(*arguments)
            except Unavailable:
                given_up.append(len(stub.seen()))
                if len(given_up) == 2:
                    stub.wake("dozing")
                raise

    monkeypatch.setattr(judging, "JudgeCalls", Waking)
    before = len(stub.seen())
    made = judge(stub, "dozing")
    made.endpoint.timeout_seconds = 0.5
    made.endpoint.max_calls = 4 * RECORDS + 20
    done = await run(site, made, max_workers=3)
    (result,) = done.judge_results
    assert len(given_up) == 2, "ten failures in a row each"
    num_spent = given_up[1] - before
    assert num_spent >= 20
    assert result.num_calls == len(stub.seen()) - before == 4 * RECORDS + 20
    assert result.num_errors == num_spent - 20, "a call for each judgement, less those that failed"


async def test_results_say_what_tokens_judges_took(site: Site, stub: Stub) -> None:
    counted, silent = judge(stub, "tie"), judge(stub, "first")
    done = await run(site, counted, silent)
    by_id = {one.judge_id: one for one in done.judge_results}
    calls = 4 * RECORDS
    assert by_id["tie"].num_calls == by_id["first"].num_calls == calls
    assert (by_id["tie"].num_prompt_tokens, by_id["tie"].num_generated_tokens) == (100 * calls, 3 * calls)
    assert (by_id["first"].num_prompt_tokens, by_id["first"].num_generated_tokens) == (0, 0)


async def test_the_judgements_are_the_same_whoever_answers(
    site: Site, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shares, "ROWS_A_BATCH", 4)
    alone = await run(site, judge(stub, "longer"))
    dealt = await run(site, judge(stub, "longer"), max_workers=3)
    assert list(dealt.judge_results) == list(alone.judge_results)
    assert list(dealt.comparisons) == list(alone.comparisons)


async def test_a_judge_that_is_away_for_a_while_is_asked_again_later(
    site: Site, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It wakes once an attempt gave it up: no judgement may be missing for that."""
    given_up = []

    class Waking(JudgeCalls):
        def ask(self, *arguments: Any) -> Any:
            try:
                return super().ask(*arguments)
            except Unavailable as error:
                given_up.append(error.reason)
                stub.wake()
                raise

    monkeypatch.setattr(judging, "JudgeCalls", Waking)
    made = judge(stub, "asleep")
    made.endpoint.timeout_seconds = 0.5
    done = await run(site, made)
    assert given_up == [Reason.JUDGE_UNAVAILABLE]
    assert (done.judge_results[0].num_asked, done.judge_results[0].num_errors) == (4 * RECORDS, 0)


@pytest.fixture(scope="module")
def judging_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that finds whatever stands first better: behind any token it says so, and behind that it ends."""
    folder = tmp_path_factory.mktemp("judge") / "judge"
    write_base(folder, 5)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(["Better: A"])
    tokenizer.save(str(folder / "tokenizer.json"))
    verdict, end = (tokenizer.token_to_id(token) for token in ("Better: A", "<|im_end|>"))
    model = AutoModelForCausalLM.from_pretrained(folder, tie_word_embeddings=False)
    weights: Any = model.state_dict()
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")) or "embed" in name or "lm_head" in name:
            weight.zero_()
    weights["model.embed_tokens.weight"][:, 0] = 1.0
    weights["model.embed_tokens.weight"][verdict, 1] = 10.0
    weights["lm_head.weight"][verdict, 0] = 1.0
    weights["lm_head.weight"][end, 1] = 10.0
    model.save_pretrained(folder)
    return folder


async def test_a_model_of_ours_judges_and_one_that_cannot_is_only_errors(
    site: Site, judging_model: Path
) -> None:
    site.models.folders = {**site.models.folders, "judge": judging_model}
    judges = [
        Judge(
            judge_id=judge_id,
            model=f"{site.PARENT}/models/{model}",
            criteria=CRITERIA,
            hides_reference=True,
            pairwise=PairwiseJudging(),
            max_new_tokens=12,
        )
        for judge_id, model in (("sure", "judge"), ("random", "tuned"))
    ]
    done = await run(site, *judges, max_records=4, arms=[ARMS[0], ARMS[2]])
    sure, random = done.judge_results
    assert (sure.num_asked, random.num_asked) == (8, 8)
    assert sure.num_errors == 0, sure.errors
    assert (sure.agreement.value, sure.position_bias.value) == (0.0, 1.0)
    assert {one.reason for one in random.errors} == {"JUDGE_ANSWER_INVALID"}
    assert random.num_errors == 8
    rows = await site.predictions(done.name)
    made = [one for row in rows for one in row.judgements if one.judge_id == "sure"]
    assert {(one.preference, one.text) for one in made} == {(JUDGE_PREFERENCE_FIRST, "Better: A")}
    assert (sure.num_calls, sure.num_generated_tokens) == (0, 8), "a token each, called by nobody"
    assert sure.num_prompt_tokens > 8 * 10
    assert done.judges[0].base_model == f"{site.PARENT}/models/judge"
    assert done.judges[1].base_model == f"{site.PARENT}/models/base"
