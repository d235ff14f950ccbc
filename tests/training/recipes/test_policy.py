"""The policy gradient: what TRL makes of the same answers, whatever the cut; advantages; who is learnt from."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.training.recipes.test_trl import assert_equal, engine_for
from tests.training.recipes.trl_cases import NUMBERS, fingerprints
from tests.training.recipes.trl_rollouts import LOSSES, PLAIN, rollouts_of

from luthier.errors import FailedPrecondition, Reason
from luthier.lm.readouts import TokenLogprobs
from luthier.training.recipes.policy import Grpo, advantages, has_spread, policy_counts, policy_objective
from luthier.training.recipes.reference import with_reference
from luthier.training.recipes.rollouts import (
    Reward,
    count_failed,
    counted,
    learnt,
    loss_divisor,
    packed_rollouts,
    require_scores,
    rollout_metrics,
)


def our_step(loss: Grpo, micro_batch_tokens: int = 200) -> tuple[dict[str, float], dict[str, Any]]:
    """Means of a step's sums, and its gradients."""
    engine, drawn = engine_for(), rollouts_of(loss)
    taught = learnt(drawn, loss)
    num_tokens = sum(len(one.token_ids) for one in taught)
    counts, gaps = policy_counts(loss, num_tokens, loss_divisor(drawn, loss)), [0.0]
    objective = policy_objective(loss, counts, gaps.append)
    totals = dict.fromkeys(counts, 0.0)
    readout = TokenLogprobs(want_entropy=True, temperature=loss.temperature, is_wide=True)
    for batch in packed_rollouts(taught, micro_batch_tokens, lambda: None):
        compared = with_reference(engine, batch, readout) if loss.kl_weight else batch
        for name, total in engine.accumulate(compared, readout, objective).items():
            totals[name] += total
    means = {name: total / counts[name] for name, total in totals.items()} | {"gap_max": max(gaps)}
    gradients = {name: one.grad for name, one in engine.weights.parameters.items() if one.grad is not None}
    return means, {"loss": means["train_loss"], "gradients": fingerprints(gradients)}


@pytest.mark.parametrize("micro_batch_tokens", [200, 15], ids=["one_pass", "several_passes"])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients_equal_what_trl_made_of_them(name: str, micro_batch_tokens: int) -> None:
    """Ratios within and beyond both bounds, advantages of both signs, answers that are dropped."""
    _, ours = our_step(LOSSES[name], micro_batch_tokens)
    assert_equal(ours, json.loads(NUMBERS.read_text())["cases"][name])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl comes with the extra bench")
@pytest.mark.filterwarnings("ignore")  # those of TRL and its libraries
@pytest.mark.parametrize("name", LOSSES)
def test_committed_numbers_are_those_of_the_installed_trl(name: str) -> None:
    from tests.training.recipes.trl_numbers import numbers_of_grpo

    assert_equal(numbers_of_grpo(name), json.loads(NUMBERS.read_text())["cases"][name])


def test_what_is_measured_is_what_the_tokens_say() -> None:
    means, _ = our_step(replace(PLAIN, kl_weight=0.3))
    engine, drawn = engine_for(), rollouts_of(PLAIN)
    now: list[float] = []
    before: list[float] = []
    weights: list[float] = []
    reference: list[float] = []
    for one in drawn:
        (batch,) = packed_rollouts([one], 200, lambda: None)
        scores = engine.score(batch, TokenLogprobs())
        now += scores.logprob.tolist()
        before += one.logprobs
        weights += [one.advantage] * len(one.token_ids)
        reference += with_reference(engine, batch).streams["reference_logprob"][scores.position + 1].tolist()
    moved = [left - right for left, right in zip(now, before, strict=True)]
    assert means["sampler_trainer_gap"] == pytest.approx(sum(map(abs, moved)) / len(moved), rel=1e-4)
    assert means["gap_max"] == pytest.approx(max(map(abs, moved)), rel=1e-4)
    clipped = [
        (weight > 0 and math.exp(one) > 1.28) or (weight < 0 and math.exp(one) < 0.8)
        for one, weight in zip(moved, weights, strict=True)
    ]
    assert 0 < sum(clipped) < len(clipped)
    assert means["clip_share"] == pytest.approx(sum(clipped) / len(clipped))
    behind = [left - right for left, right in zip(reference, now, strict=True)]
    kl = [math.exp(one) * (math.exp(d) - d - 1) for one, d in zip(moved, behind, strict=True)]
    assert means["kl"] == pytest.approx(sum(kl) / len(kl), rel=1e-3)
    assert 3 < means["entropy"] < math.log(97)


def test_temperature_is_that_of_what_is_learnt() -> None:
    cold, _ = our_step(replace(PLAIN, temperature=0.5))
    warm, _ = our_step(replace(PLAIN, temperature=2.0))
    assert cold["entropy"] < our_step(PLAIN)[0]["entropy"] < warm["entropy"]


@pytest.mark.parametrize("scale_by_spread", [False, True])
def test_advantages_are_rewards_less_the_mean_of_those_that_have_one(scale_by_spread: bool) -> None:
    rewards = [1.0, None, 0.0, 0.5, 0.0]
    known = torch.tensor([1.0, 0.0, 0.5, 0.0])
    expected = known - known.mean()
    if scale_by_spread:
        expected = expected / (known.std() + 1e-4)
    found = advantages(rewards, scale_by_spread=scale_by_spread)
    assert found[1] == 0.0
    assert found[:1] + found[2:] == pytest.approx(expected.tolist())


@pytest.mark.parametrize("rewards", [[0.1, 0.1, 0.1], [0.7, None, 0.7], [None, None], [0.3, None]])
def test_a_group_without_spread_teaches_exactly_nothing(rewards: list[float | None]) -> None:
    assert not has_spread(rewards)
    assert advantages(rewards, scale_by_spread=True) == [0.0] * len(rewards)


def test_answers_that_have_no_reward_or_are_dropped_do_not_count() -> None:
    drawn = rollouts_of(PLAIN)
    drawn[0] = replace(drawn[0], reward=Reward(score=None, message="no"), advantage=0.0)
    assert count_failed(drawn) == 1
    assert [len(one.token_ids) for one in counted(drawn, PLAIN)] == [2, 5, 3, 6, 2]
    assert loss_divisor(drawn, PLAIN) == 18
    dropping = replace(PLAIN, drop_truncated=True)
    assert loss_divisor(drawn, dropping) == 6 + 2
    assert loss_divisor(drawn, replace(dropping, normaliser="CONSTANT")) == 6 * 8
    metrics = rollout_metrics(drawn)
    assert metrics["num_grader_errors"] == 1
    assert metrics["truncated_share"] == pytest.approx(3 / 6)
    assert metrics["answer_tokens"] == pytest.approx((22 - 3) / 6)  # three ended of themselves
    assert metrics["reward_mean"] == pytest.approx((0 + 0.25 + 0 + 1 + 0.5) / 5)
    assert metrics["share_without_spread"] == 0


def test_answers_without_an_advantage_pass_only_where_they_are_held_to_the_start() -> None:
    drawn = rollouts_of(PLAIN)
    drawn[:3] = [replace(one, reward=Reward(score=0.5), advantage=0.0) for one in drawn[:3]]
    assert learnt(drawn, PLAIN) == drawn[3:5]  # the last is as good as the mean of its group
    assert learnt(drawn, replace(PLAIN, kl_weight=0.1)) == drawn
    assert rollout_metrics(drawn)["share_without_spread"] == 0.5
    drawn[3:] = [replace(one, advantage=0.0) for one in drawn[3:]]
    assert learnt(drawn, replace(PLAIN, kl_weight=0.1)) == []


def test_too_many_answers_without_a_score_fail_with_the_words_of_the_last() -> None:
    drawn = rollouts_of(PLAIN)
    require_scores(drawn, 3, replace(PLAIN, max_grader_errors=3))  # none of these failed
    drawn[1] = replace(
        drawn[1], reward=Reward(score=None, reason=Reason.SCORE_NOT_FINITE, message="grader a: got nan")
    )
    require_scores(drawn, 2, replace(PLAIN, max_grader_errors=3))
    with pytest.raises(
        FailedPrecondition, match=r"fewer than 3 answers .*, 3 are; .*: grader a: got nan"
    ) as caught:
        require_scores(drawn, 3, replace(PLAIN, max_grader_errors=3))
    assert caught.value.reason == Reason.SCORE_NOT_FINITE
