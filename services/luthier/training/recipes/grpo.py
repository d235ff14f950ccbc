"""Reinforcement from rewards (GRPO): answers that were better than others to the same prompt become likelier."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from luthier.errors import FailedPrecondition, Reason
from luthier.lm.readouts import TokenLogprobs
from luthier.training.recipes.batches import Step
from luthier.training.recipes.corpus import Corpus
from luthier.training.recipes.course import Course, Event, Warned
from luthier.training.recipes.engine import Engine
from luthier.training.recipes.loop import Loop, Settings
from luthier.training.recipes.policy import Grpo, policy_counts, policy_objective
from luthier.training.recipes.reference import with_reference
from luthier.training.recipes.rollouts import (
    Drawer,
    Drawn,
    Rollout,
    Rollouts,
    all_cut,
    count_failed,
    last_failure,
    learnt,
    loss_divisor,
    packed_rollouts,
    require_a_score,
    require_scores,
    rollout_metrics,
)
from luthier.training.recipes.units import PROMPTS, require_units

MOST_GAP = 0.1
"""Mean difference of log-probabilities, in nats, that rounding does not explain: SmolLM2-135M in bfloat16 has 0.03."""


def train(
    engine: Engine,
    corpus: Corpus,
    settings: Settings,
    loss: Grpo,
    rollouts: Rollouts,
    course: Course,
    check: Callable[[], None] = lambda: None,
) -> Iterator[Event | Warned]:
    """Make all steps after those of `course`, yielding after each.

    A step draws answers to its prompts with the weights as they are, has them graded and kept, and then changes the
    weights once; what was kept of it before is learnt from again. `corpus` expects answers (`Corpus.expect_answers`).
    Of several ranks each draws to some of the prompts; the first has all answers graded and kept, and asks `rollouts`
    alone, of which the others read `stop_token_ids`.
    The reference is the model as the weights found it (`Weights.reference`).

    Raises:
        FailedPrecondition: ROWS_NOT_OF_METHOD, LOSS_NOT_FINITE, METRIC_NOT_MEASURED, OUTPUT_NOT_FINITE;
            NO_REWARD_SPREAD at the end, where no step taught anything; the grader's reason, where too many answers got
            no score, or none of a step or of a validation that the run is judged by.
        Exception: what `check` or `rollouts` raised.
    """
    for split in ("TRAIN", "VALIDATION"):
        require_units(corpus.lengths(split), corpus.roles(split), PROMPTS)
    loop = Loop(engine, corpus, settings, course, check)
    batches = settings.batches
    drawer = Drawer(
        engine=engine,
        corpus=corpus,
        loss=loss,
        rollouts=rollouts,
        seed=batches.seed,
        micro_batch_tokens=batches.micro_batch_tokens,
        check=check,
    )
    for step in loop.steps():
        with engine.clock.within("sampling"):
            drawn = drawer.of_step(step, _most_errors(loop, loss))
        loop.fail(count_failed(drawn.rollouts))
        require_scores(drawn.rollouts, loop.course.grader_errors, loss)
        require_a_score(drawn.rollouts, f"step {step.step}")
        yield from _failures(step.step, "answers", drawn.rollouts)
        metrics = _learn(loop, drawer, step, drawn)
        yield from _warnings(step.step, metrics, loss, is_cut=all_cut(drawn.rollouts))
        if loop.is_validated(step):
            with engine.clock.within("validation"):
                answers = drawer.of_validation(loop.validations[0], _most_errors(loop, loss))
            loop.fail(count_failed(answers))
            require_scores(answers, loop.course.grader_errors, loss)
            yield from _failures(step.step, "validation answers", answers)
            measured = validation_metrics(answers)
            if settings.selection is not None and settings.selection.metric not in measured:
                require_a_score(answers, f"the validation of step {step.step}")
            metrics |= measured
        yield from loop.finish(step, metrics)
    _require_taught(loop.course, loss)


def _most_errors(loop: Loop, loss: Grpo) -> int:
    """Return how many more answers without a score fail the run."""
    return loss.max_grader_errors - loop.course.grader_errors


def _learn(loop: Loop, drawer: Drawer, step: Step, drawn: Drawn) -> dict[str, float]:
    """Change the weights once by what a step drew, if it teaches anything; returns the step's metrics."""
    engine, loss, began, gaps = drawer.engine, drawer.loss, time.perf_counter(), [0.0]
    engine.clock.enter("compute")
    taught = learnt(drawn.rollouts, loss)
    num_learnt = sum(len(one.token_ids) for one in taught)
    counts = policy_counts(loss, num_learnt, loss_divisor(drawn.rollouts, loss))
    objective = policy_objective(loss, counts, gaps.append)
    readout = TokenLogprobs(temperature=loss.temperature, is_wide=True)
    learnt_readout = replace(readout, want_entropy=True)
    for batch in packed_rollouts(taught, drawer.micro_batch_tokens, drawer.check, engine.collective):
        compared = with_reference(engine, batch, readout) if loss.kl_weight else batch
        loop.add(compared, engine.accumulate(compared, learnt_readout, objective))
    metrics = loop.update(step, counts) if taught else loop.skip(step, is_cut=all_cut(drawn.rollouts))
    if taught:
        metrics["sampler_trainer_gap_max"] = max(engine.collective.gathered(max(gaps)))
    # A plan knows the most that a step may have; this is what it had.
    num_tokens = sum(len(one.prompt) + len(one.token_ids) for one in drawn.rollouts)
    metrics["tokens_per_second"] *= num_tokens / metrics["num_tokens"]
    return {
        **metrics,
        **rollout_metrics(drawn.rollouts),
        "num_tokens": float(num_tokens),
        "num_supervised_tokens": float(num_learnt),
        "sampling_seconds": drawn.sampling_seconds,
        "grading_seconds": drawn.grading_seconds,
        "training_seconds": time.perf_counter() - began,
    }


def validation_metrics(answers: tuple[Rollout, ...]) -> dict[str, float]:
    """Return what validation answers were like: nothing without any, no `validation_reward` where none has a score."""
    if not answers:
        return {}
    scores = [one.score for one in answers if one.score is not None]
    rewards = {"validation_reward": statistics.fmean(scores)} if scores else {}
    return {
        **rewards,
        "validation_grader_errors": float(len(answers) - len(scores)),
        "validation_answer_tokens": statistics.fmean(len(one.token_ids) for one in answers),
        "validation_truncated_share": statistics.fmean(one.is_truncated for one in answers),
    }


def _failures(step: int, what: str, rollouts: Sequence[Rollout]) -> Iterator[Warned]:
    last = last_failure(rollouts)
    if last is not None:
        text = f"step {step}: {count_failed(rollouts)} of {len(rollouts)} {what} have no score; the last of them: "
        yield Warned(step=step, text=text + last.message)


def _warnings(step: int, metrics: Mapping[str, float], loss: Grpo, *, is_cut: bool) -> Iterator[Warned]:
    gap = metrics.get("sampler_trainer_gap", 0.0)
    if gap > MOST_GAP:
        yield Warned(
            step=step,
            text=f"step {step}: log-probabilities differ by {gap:.3f} between sampling and training, by at most "
            f"{metrics['sampler_trainer_gap_max']:.3f}; more than {MOST_GAP:g} on average is no rounding: what is "
            "sampled from may not be what trains",
        )
    if not metrics["num_taught"]:
        why = (
            f"no two answers to a prompt had different rewards ({metrics['num_grader_errors']:.0f} had none)"
        )
        if is_cut:
            why = (
                "rewards differed, but all answers that could have taught were cut at max_new_tokens "
                f"{loss.max_new_tokens} and dropped; raise it"
            )
        yield Warned(step=step, text=f"step {step} taught nothing and left the weights as they are: {why}")


def _require_taught(course: Course, loss: Grpo) -> None:
    if not course.step or course.idle_steps < course.step:
        return
    if course.cut_steps:
        raise FailedPrecondition(
            "an answer that was not cut must have had another reward than others to its prompt in at least one step, "
            f"in {course.cut_steps} of {course.step} steps rewards differed, but all answers that could have taught "
            f"were cut at max_new_tokens {loss.max_new_tokens} and dropped: raise max_new_tokens, or unset "
            "drop_truncated",
            reason=Reason.NO_REWARD_SPREAD,
            metadata={"num_steps": str(course.step), "num_cut_steps": str(course.cut_steps)},
        )
    raise FailedPrecondition(
        "the rewards of answers to one prompt must differ in at least one step, they did in none of "
        f"{course.step}; the last step's mean was {course.metrics['reward_mean']:g}: use another grader, prompts of "
        "another difficulty, more samples or a higher temperature",
        reason=Reason.NO_REWARD_SPREAD,
        metadata={"num_steps": str(course.step)},
    )
