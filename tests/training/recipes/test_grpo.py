"""Reinforcement: it learns from rewards, tells of what teaches nothing, and goes on after a stop as if it never had."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.training.recipes.pairs import corpus_of_units
from tests.training.recipes.prompt_runs import END, LOSS, Run, digests, songs
from transformers import PreTrainedModel

from luthier.errors import DataLoss, FailedPrecondition, Reason
from luthier.lm.engine import Engine as ServingEngine
from luthier.lm.generate import GenerationRequest
from luthier.lm.lora import activate
from luthier.training.recipes import checkpoint, grpo
from luthier.training.recipes import rollouts as drawing
from luthier.training.recipes.corpus import Split
from luthier.training.recipes.course import CheckpointDue, Course, StepDone
from luthier.training.recipes.policy import Grpo
from luthier.training.recipes.position import Mark, noted
from luthier.training.recipes.rollouts import Drawer, Reward, Rollout

ModelMaker = Callable[..., PreTrainedModel]


@pytest.mark.parametrize("kind", ["adapter", "all"])
@pytest.mark.parametrize(
    "changes", [{}, {"normaliser": "CONSTANT", "scale_by_spread": True, "temperature": 1.3}]
)
def test_rewards_rise(tiny_llama: ModelMaker, kind: str, changes: dict[str, Any]) -> None:
    run = Run(tiny_llama(), loss=replace(LOSS, **changes), kind=kind, num_epochs=8)
    steps = run.finish()
    first, last = (sum(one["reward_mean"] for one in some) / 3 for some in (steps[:3], steps[-3:]))
    assert len(steps) == 24
    assert last > first + 0.08  # four times what 72 answers scatter by
    assert max(one["sampler_trainer_gap_max"] for one in steps if "train_loss" in one) < 1e-3
    assert run.rollouts.graded_splits.count("VALIDATION") == 8


def test_a_validation_is_the_reward_of_the_likeliest_answers(tiny_llama: ModelMaker) -> None:
    run = Run(tiny_llama(), lambda one: Reward(score=float(len(set(one.token_ids)))))
    found = [one["validation_reward"] for one in run.finish() if "validation_reward" in one]
    rows = [length.row for length in run.corpus.lengths("VALIDATION")]
    request = GenerationRequest(
        request_id="again",
        prompts=tuple(run.corpus.tokens(row, "VALIDATION") for row in rows),
        max_new_tokens=8,
        adapter="default",
        stop_token_ids=frozenset({END}),
    )
    serving = ServingEngine(run.engine.weights.model)
    serving.submit(request)
    words: dict[int, set[int]] = {row: set() for row in range(len(rows))}
    while serving.wait(0):
        for event in serving.step():
            words[event.row].update(event.token_ids)
    assert len(found) == 2
    assert found[-1] == pytest.approx(sum(map(len, words.values())) / len(rows))


@pytest.mark.parametrize("kind", ["adapter", "all"])
def test_a_divergence_that_weighs_much_holds_the_model_where_it_began(
    tiny_llama: ModelMaker, kind: str
) -> None:
    free = Run(tiny_llama(), loss=replace(LOSS, kl_weight=1e-6), kind=kind, num_epochs=4).finish()
    held = Run(tiny_llama(), loss=replace(LOSS, kl_weight=20.0), kind=kind, num_epochs=4).finish()
    assert free[0]["kl"] == pytest.approx(0.0, abs=1e-5)  # nothing has moved yet
    assert free[-1]["kl"] > 4 * held[-1]["kl"] > 0
    assert free[-1]["reward_mean"] > held[-1]["reward_mean"]


def test_a_step_tells_what_it_drew_and_how_long_it_took(tiny_llama: ModelMaker) -> None:
    run = Run(tiny_llama())
    first = next(event.metrics for event in run.events() if isinstance(event, StepDone))
    drawn = run.rollouts.stored[1]
    scores = [one.score for one in drawn if one.score is not None]
    assert len(drawn) == 4 * 6 == len(scores)
    assert [(one.group, one.sample) for one in drawn] == [
        (group, place) for group in range(4) for place in range(6)
    ]
    assert sorted({one.row for one in drawn}) == [one.row for one in drawn[::6]]
    assert first["reward_mean"] == pytest.approx(sum(scores) / 24)
    assert first["reward_std"] == pytest.approx(statistics.pstdev(scores))
    assert first["reward_std"] > 0.05
    assert first["num_tokens"] == sum(len(one.prompt) + len(one.token_ids) for one in drawn)
    words = [[token for token in one.token_ids if token != END] for one in drawn]
    assert first["answer_tokens"] == pytest.approx(sum(map(len, words)) / 24)
    assert first["truncated_share"] == sum(one.token_ids[-1] != END for one in drawn) / 24
    assert first["sampling_seconds"] > 0
    assert first["training_seconds"] > 0
    assert first["num_taught"] == sum(one.advantage != 0 for one in drawn)
    assert first["entropy"] > 0
    assert first["clip_share"] == 0  # one update a step: ratios are those of rounding


def test_a_loss_that_is_not_finite_names_the_prompts_of_its_pass(
    tiny_llama: ModelMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A word of one prompt is broken between drawing and learning: else nothing could be drawn."""
    model: Any = tiny_llama()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    run = Run(model, micro_batch_tokens=40)
    run.engine.mark = Mark(tmp_path / "position")
    keep, broken = run.rollouts.keep, list[int]()

    def keep_and_break(step: int, rollouts: Sequence[Rollout]) -> None:
        keep(step, rollouts)
        words = {one.row: set(one.prompt) for one in rollouts}
        drawn = {token for one in rollouts for token in one.token_ids}
        row, word = next(
            (one.row, word)
            for one in rollouts
            for word in one.prompt
            if one.advantage and not any(word in other for row, other in words.items() if row != one.row)
            if word not in drawn
        )
        broken.append(row)
        with torch.no_grad():
            model.model.embed_tokens.weight[word] = float("inf")

    monkeypatch.setattr(run.rollouts, "keep", keep_and_break)
    with pytest.raises(
        FailedPrecondition, match="must be finite, got nan at step 1, whose rows are"
    ) as caught:
        run.finish()
    named = [int(row) for row in caught.value.metadata["rows"].split(",")]
    assert caught.value.reason == Reason.LOSS_NOT_FINITE
    assert broken[0] in named
    assert len(named) == len(set(named)) == int(caught.value.metadata["num_rows"]) < 4
    found = noted(tmp_path / "position")
    assert found is not None
    assert (found.step, {row for _, row in found.rows} <= {one.row for one in run.rollouts.stored[1]}) == (
        1,
        True,
    )


@pytest.mark.parametrize("loss", [LOSS, replace(LOSS, kl_weight=0.1, temperature=0.9)], ids=["plain", "kl"])
def test_a_step_cut_into_micro_batches_equals_one_batch_within_rounding(
    tiny_llama: ModelMaker, loss: Grpo
) -> None:
    found = []
    for micro_batch_tokens in (16, 1000):
        run = Run(tiny_llama(), loss=loss, micro_batch_tokens=micro_batch_tokens, max_steps=3)
        found.append((run.finish(), run.rollouts.stored, run.engine.weights.parameters))
    (cut, cut_drawn, cut_weights), (whole, drawn, weights) = found
    for step, rollouts in drawn.items():
        assert [one.token_ids for one in cut_drawn[step]] == [one.token_ids for one in rollouts]
    for left, right in zip(cut, whole, strict=True):
        assert left == pytest.approx(right, rel=1e-3, abs=1e-4)
    for name, tensor in weights.items():
        torch.testing.assert_close(cut_weights[name], tensor, rtol=1e-2, atol=2e-4)


@pytest.mark.parametrize("kind", ["adapter", "all"])
def test_what_was_kept_is_learnt_from_again_and_ends_with_the_same_bits(
    tiny_llama: ModelMaker, kind: str, tmp_path: Path
) -> None:
    """Killed after the rollouts of step 4 were kept, before their update; the last checkpoint is of step 2."""
    dtype = torch.bfloat16
    whole = Run(tiny_llama(dtype), kind=kind)
    wanted = whole.finish(tmp_path / "whole")

    first = Run(tiny_llama(dtype), kind=kind)

    def keep_and_die(step: int, rollouts: Sequence[Rollout]) -> None:
        first.rollouts.stored[step] = tuple(rollouts)
        if step == 4:
            raise KeyboardInterrupt

    first.rollouts.keep = keep_and_die  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        first.finish(tmp_path / "stopped")
    assert sorted(first.rollouts.stored) == [1, 2, 3, 4]

    second = Run(tiny_llama(dtype), kind=kind)
    second.rollouts.stored = {step: first.rollouts.stored[step] for step in (3, 4)}
    course, changed = checkpoint.load(tmp_path / "stopped", second.engine, second.identity)
    rest = second.finish(tmp_path / "resumed", course)

    assert (course.step, changed) == (2, [])
    assert rest == wanted[2:]
    assert second.rollouts.stored == {step: whole.rollouts.stored[step] for step in range(3, 7)}
    assert digests(tmp_path / "resumed") == digests(tmp_path / "whole")
    assert second.rollouts.graded_splits.count("TRAIN") == 2  # of steps 5 and 6


def test_what_was_kept_is_learnt_from_and_not_what_would_be_drawn(tiny_llama: ModelMaker) -> None:
    run, other = Run(tiny_llama(), max_steps=1), Run(tiny_llama(), max_steps=1)
    run.finish()
    other.rollouts.stored = {
        1: tuple(replace(one, advantage=-one.advantage) for one in run.rollouts.stored[1])
    }
    other.finish()
    assert other.rollouts.graded_splits == ["VALIDATION"]
    for name, tensor in run.engine.weights.parameters.items():
        if "lora_B" in name:
            assert not torch.equal(tensor, other.engine.weights.parameters[name])


def test_rollouts_of_other_prompts_are_refused(tiny_llama: ModelMaker) -> None:
    run = Run(tiny_llama())
    run.finish()
    other = Run(tiny_llama())
    other.rollouts.stored = {1: run.rollouts.stored[2]}
    with pytest.raises(DataLoss, match="kept of step 1 must be of its prompts"):
        other.finish()


def constant(rollout: Rollout) -> Reward:
    del rollout
    return Reward(score=0.7)


def test_a_run_whose_every_step_taught_nothing_fails_and_leaves_the_weights(
    tiny_llama: ModelMaker, tmp_path: Path
) -> None:
    run = Run(tiny_llama(), constant)
    before = {name: one.detach().clone() for name, one in run.engine.weights.parameters.items()}
    with pytest.raises(FailedPrecondition, match=r"in none of 6; the last step's mean was 0\.7") as caught:
        run.finish(tmp_path)
    assert caught.value.reason == Reason.NO_REWARD_SPREAD
    assert [one.step for one in run.warnings] == [1, 2, 3, 4, 5, 6]
    assert "step 1 taught nothing" in run.warnings[0].text
    for name, one in run.engine.weights.parameters.items():
        assert torch.equal(one, before[name])
    again = Run(tiny_llama(), constant)
    course, _ = checkpoint.load(tmp_path, again.engine, again.identity)
    assert (course.step, course.idle_steps) == (6, 6)
    with pytest.raises(FailedPrecondition, match="in none of 6"):
        again.finish(course=course)


def test_steps_that_teach_nothing_are_told_of_and_the_optimiser_does_not_count_them(
    tiny_llama: ModelMaker, tmp_path: Path
) -> None:
    """Steps 1 to 3 teach nothing: the checkpoint of step 2 has no moment yet, that of step 4 those of one update."""

    def make(threshold: int) -> Run:
        run = Run(tiny_llama())
        run.rollouts.grader = lambda one: (
            constant(one) if len(run.rollouts.stored) < threshold else songs(one)
        )
        return run

    whole = make(3)
    wanted = whole.finish(tmp_path / "whole")
    assert [one["share_without_spread"] == 1 for one in wanted] == [True] * 3 + [False] * 3
    assert ["train_loss" in one for one in wanted] == [False] * 3 + [True] * 3
    assert [one["num_taught"] > 0 for one in wanted] == [False] * 3 + [True] * 3
    assert [one.step for one in whole.warnings] == [1, 2, 3]
    for stop in (2, 4):
        first = make(3)
        due = (event for event in first.events() if isinstance(event, CheckpointDue))
        event = next(one for one in due if one.course.step == stop)
        checkpoint.save(tmp_path / str(stop), first.engine, event.course, first.identity)
        second = make(3)
        second.rollouts.stored = {step: first.rollouts.stored[step] for step in range(1, stop + 1)}
        course, _ = checkpoint.load(tmp_path / str(stop), second.engine, second.identity)
        assert second.finish(tmp_path / "resumed", course) == wanted[stop:]
        assert digests(tmp_path / "resumed") == digests(tmp_path / "whole")


def test_answers_that_were_cut_teach_nothing_where_they_are_dropped(tiny_llama: ModelMaker) -> None:
    run = Run(tiny_llama(), loss=replace(LOSS, drop_truncated=True, max_new_tokens=8), max_steps=2)
    run.rollouts.stop_token_ids = frozenset(range(3, 20))
    steps = run.finish()
    drawn = run.rollouts.stored[1]
    cut = [one for one in drawn if one.is_truncated]
    assert 0 < len(cut) < len(drawn)
    assert {one.advantage for one in cut} == {0.0}
    assert all(one.score is not None for one in cut)
    assert steps[0]["truncated_share"] == len(cut) / len(drawn)
    assert steps[0]["num_supervised_tokens"] == sum(len(one.token_ids) for one in drawn if one.advantage)


def cut_alone(rollout: Rollout) -> Reward:
    """Answers that end of themselves are all worth the same."""
    return songs(rollout) if rollout.is_truncated else Reward(score=0.5)


def test_a_run_whose_answers_were_cut_wherever_they_could_have_taught_is_told_so(
    tiny_llama: ModelMaker, tmp_path: Path
) -> None:
    run = Run(tiny_llama(), cut_alone, loss=replace(LOSS, drop_truncated=True, max_new_tokens=3), max_steps=2)
    with pytest.raises(FailedPrecondition, match="in 2 of 2 steps rewards differed, but all") as caught:
        run.finish(tmp_path)
    assert "were cut at max_new_tokens 3 and dropped: raise max_new_tokens, or unset" in caught.value.message
    assert caught.value.reason == Reason.NO_REWARD_SPREAD
    assert [one.text for one in run.warnings] == [
        f"step {step} taught nothing and left the weights as they are: rewards differed, but all answers that could "
        "have taught were cut at max_new_tokens 3 and dropped; raise it"
        for step in (1, 2)
    ]
    course, _ = checkpoint.load(tmp_path, run.engine, run.identity)
    assert (course.idle_steps, course.cut_steps) == (2, 2)


def test_a_sampler_that_draws_from_other_weights_is_warned_of(
    tiny_llama: ModelMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trap in which an adapter never reaches the sampler: it draws from the base while the adapter moves away."""
    module: Any = Drawer
    original = module._drawn

    @contextmanager
    def of_base(model: Any) -> Iterator[None]:
        activate(model, None)
        try:
            yield
        finally:
            activate(model, "default")

    def drawn(drawer: Any, *given: Any) -> Any:
        with of_base(drawer.engine.weights.model):
            return original(drawer, *given)

    monkeypatch.setattr(module, "_drawn", drawn)
    run = Run(tiny_llama(), num_epochs=3)
    steps = run.finish()
    assert steps[0]["sampler_trainer_gap"] < 1e-4
    assert steps[-1]["sampler_trainer_gap"] > grpo.MOST_GAP
    told = [one for one in run.warnings if "differ by" in one.text]
    assert told
    assert f"step {told[0].step}: log-probabilities differ by" in told[0].text
    assert steps[told[0].step - 1]["sampler_trainer_gap"] > grpo.MOST_GAP


def test_the_seconds_of_grading_are_not_those_of_keeping(
    tiny_llama: ModelMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, clock = Run(tiny_llama(), max_steps=1), [0.0]
    graded, keep = run.rollouts.graded, run.rollouts.keep

    def slowly_graded(rollouts: Sequence[Rollout], split: Split, most_errors: int) -> list[Reward]:
        clock[0] += 10.0
        return graded(rollouts, split, most_errors)

    def slowly_kept(step: int, rollouts: Sequence[Rollout]) -> None:
        clock[0] += 100.0
        keep(step, rollouts)

    run.rollouts.graded = slowly_graded  # type: ignore[method-assign]
    run.rollouts.keep = slowly_kept  # type: ignore[method-assign]
    monkeypatch.setattr(drawing, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    metrics = next(event.metrics for event in run.events() if isinstance(event, StepDone))
    assert (metrics["sampling_seconds"], metrics["grading_seconds"]) == (0.0, 10.0)


def test_the_token_that_ends_an_answer_counts_in_no_mean_length(tiny_llama: ModelMaker) -> None:
    """Every first token ends its answer: nothing is left of any."""
    run = Run(tiny_llama(), lambda one: Reward(score=float(one.sample)), max_steps=1)
    run.rollouts.stop_token_ids = frozenset(range(200))
    (metrics,) = run.finish()
    assert (metrics["truncated_share"], metrics["validation_truncated_share"]) == (0, 0)
    assert (metrics["answer_tokens"], metrics["validation_answer_tokens"]) == (0, 0)


def test_rows_of_another_method_are_refused_and_named(tiny_llama: ModelMaker) -> None:
    run = Run(tiny_llama())
    run.corpus = corpus_of_units([("TRAIN", [("", [5, 6], [7, 8])])])
    with pytest.raises(FailedPrecondition, match="must be prompt, that of row 0 is a single row") as caught:
        run.finish()
    assert caught.value.reason == Reason.ROWS_NOT_OF_METHOD


def test_check_stops_inside_a_draw(tiny_llama: ModelMaker) -> None:
    run, calls = Run(tiny_llama()), []

    def check() -> None:
        calls.append(1)
        if len(calls) == 5:
            raise KeyError("stop")

    given = (run.engine, run.corpus, run.settings, run.loss, run.rollouts, Course(), check)
    with pytest.raises(KeyError, match="stop"):
        next(grpo.train(*given))
    assert run.rollouts.stored == {}
