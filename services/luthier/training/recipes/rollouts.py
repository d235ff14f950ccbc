"""Answers that a step of reinforcement learns from: drawn, graded, kept before the update, and packed for it."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from luthier.errors import DataLoss, FailedPrecondition, Reason
from luthier.lm.generate import FinishReason, GenerationRequest
from luthier.lm.packed import WEIGHT, PackedBatch, pack
from luthier.lm.sampling import Answer, sample
from luthier.training.recipes.batches import Step, Unit, pack_first_fit
from luthier.training.recipes.collective import Collective, OneRank, dealt, share_of
from luthier.training.recipes.corpus import Corpus, Split
from luthier.training.recipes.engine import Engine
from luthier.training.recipes.policy import ADVANTAGE, SAMPLER, Grpo, advantages, has_spread

_CACHE_BATCHES = 16
"""Tokens whose keys and values are held while sampling, in micro-batches: they take a fraction of what a token takes
that is learnt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """What a grader made of an answer: `score`, or why there is none where that is None.

    `parts` are the scores of graders within it.
    """

    score: float | None
    reason: Reason | None = None
    message: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """An answer that was drawn to a prompt, and what it was worth.

    Attributes:
        group: the prompt's place in its step, from 0, by ascending row.
        sample: the answer's place among those to the prompt, from 0.
        row: the prompt's row in the rendering.
        prompt: its tokens.
        token_ids: the answer's, with the one that stopped it unless it is of a validation.
        logprobs: what each was drawn with, values of float32.
        finish_reason: STOP, or LENGTH where it was cut.
        reward: None before it is graded.
        advantage: what its tokens are weighted with; 0: nothing is learnt from it, a divergence apart.
    """

    group: int
    sample: int
    row: int
    prompt: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    reward: Reward | None = None
    advantage: float = 0.0

    @property
    def score(self) -> float | None:
        """Its reward; None without one."""
        return None if self.reward is None else self.reward.score

    @property
    def is_truncated(self) -> bool:
        """Whether it was cut at the longest length."""
        return self.finish_reason is FinishReason.LENGTH


class Rollouts(Protocol):
    """What a run is given to grade answers with, and to keep them.

    Attributes:
        stop_token_ids: tokens that end an answer.
    """

    stop_token_ids: frozenset[int]

    def kept(self, step: int) -> Sequence[Rollout]:
        """Return those of a step that were kept by an earlier attempt, graded; nothing: they are to be drawn."""
        ...

    def graded(self, rollouts: Sequence[Rollout], split: Split, most_errors: int) -> list[Reward]:
        """Return what each answer to a row of a split is worth, in their order; a score is a finite number.

        With `most_errors` answers without a score the run fails, so that no more need be graded then; or it raises,
        where a later attempt may have them.
        """
        ...

    def keep(self, step: int, rollouts: Sequence[Rollout]) -> None:
        """Keep what a step learns from; it is there for every later attempt when this returns."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """The answers of a step, and the seconds that drawing and grading took: 0 where they were kept.

    Grading begins with making text of answers, and ends before they are kept.
    """

    rollouts: tuple[Rollout, ...]
    sampling_seconds: float = 0.0
    grading_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawer:
    """Draws and grades the answers of a run.

    Attributes:
        engine: whose weights are sampled from, as they are when it is asked; its ranks share the prompts.
        corpus: the prompts.
        loss: how many answers, how long and at which temperature.
        rollouts: what grades and keeps them.
        seed: of the run; with the step, the prompt's place and the answer's it decides the random numbers.
        micro_batch_tokens: of the run.
        check: called before each forward pass.
    """

    engine: Engine
    corpus: Corpus
    loss: Grpo
    rollouts: Rollouts
    seed: int
    micro_batch_tokens: int
    check: Callable[[], None]

    def of_step(self, step: Step, most_errors: int) -> Drawn:
        """Return the answers of a step, with rewards and advantages, kept already.

        With `most_errors` without a score the run fails.

        Raises:
            FailedPrecondition: OUTPUT_NOT_FINITE.
            DataLoss: what was kept of the step is of other prompts.
            Exception: what `rollouts` raised, before anything was kept where it was in grading.
        """
        rows = _in_order(step.micro_batches)
        collective = self.engine.collective
        kept = collective.of_first(lambda: tuple(self.rollouts.kept(step.step)))
        if kept:
            wanted = [row for row in rows for _ in range(self.loss.num_samples)]
            if [one.row for one in kept] != wanted:
                raise DataLoss(
                    f"the rollouts that were kept of step {step.step} must be of its prompts, got others"
                )
            return Drawn(rollouts=kept)
        began = time.perf_counter()
        digest = hashlib.sha256(f"{self.seed}/{step.step}".encode()).digest()
        request = self._request(rows, "TRAIN", seed=int.from_bytes(digest[:8], "little"))
        drawn = self._drawn(request, rows)
        sampled = time.perf_counter()
        found = _compared(self._graded(drawn, "TRAIN", most_errors), self.loss)
        graded = time.perf_counter()
        collective.of_first(lambda: self.rollouts.keep(step.step, found))
        return Drawn(rollouts=found, sampling_seconds=sampled - began, grading_seconds=graded - sampled)

    def of_validation(self, batches: Sequence[Sequence[int]], most_errors: int) -> tuple[Rollout, ...]:
        """Return the likeliest answer to each validation row, with its reward. `most_errors` as in a step."""
        rows = _in_order(batches)
        if not rows:
            return ()
        request = self._request(rows, "VALIDATION", num_samples=1, temperature=0.0, want_logprobs=False)
        return self._graded(self._drawn(request, rows), "VALIDATION", most_errors)

    def _request(self, rows: Sequence[int], split: Split, **changes: Any) -> GenerationRequest:
        return replace(
            GenerationRequest(
                request_id=split,
                prompts=tuple(self.corpus.tokens(row, split) for row in rows),
                max_new_tokens=self.loss.max_new_tokens,
                temperature=self.loss.temperature,
                stop_token_ids=self.rollouts.stop_token_ids,
                num_samples=self.loss.num_samples,
                want_logprobs=True,
            ),
            **changes,
        )

    def _drawn(self, request: GenerationRequest, rows: Sequence[int]) -> list[Rollout]:
        limit = _CACHE_BATCHES * self.micro_batch_tokens
        # A row's random numbers depend on its place among those of all ranks, and so not on their number.
        collective = self.engine.collective
        share = share_of(len(request.prompts), collective)
        own = replace(
            request,
            prompts=request.prompts[share.start : share.stop],
            first_row=request.first_row + share.start * request.num_samples,
        )

        self.engine.mark.at(rows[share.start : share.stop])

        def draw() -> list[Answer]:
            model = self.engine.weights.model
            return sample(model, own, limit_tokens=limit, check=self.check) if share else []

        drawn_here = self.engine.with_whole_weights(draw)
        answers = [answer for part in collective.gathered(drawn_here) for answer in part]
        drawn = []
        for place, answer in enumerate(answers):
            group, number = divmod(place, request.num_samples)
            drawn.append(
                Rollout(
                    group=group,
                    sample=number,
                    row=rows[group],
                    prompt=request.prompts[group],
                    token_ids=answer.token_ids,
                    logprobs=answer.logprobs,
                    finish_reason=answer.finish_reason,
                )
            )
        return drawn

    def _graded(self, drawn: Sequence[Rollout], split: Split, most_errors: int) -> tuple[Rollout, ...]:
        rewards = self.engine.collective.of_first(lambda: self.rollouts.graded(drawn, split, most_errors))
        return tuple(replace(one, reward=reward) for one, reward in zip(drawn, rewards, strict=True))


def _in_order(batches: Sequence[Sequence[int]]) -> list[int]:
    """Return the rows of some batches by their number, so that nothing depends on how they are cut."""
    return sorted(row for rows in batches for row in rows)


def groups_of(rollouts: Sequence[Rollout]) -> list[Sequence[Rollout]]:
    """Return rollouts by prompt."""
    num_groups = rollouts[-1].group + 1
    size = len(rollouts) // num_groups
    return [rollouts[place * size : (place + 1) * size] for place in range(num_groups)]


def _compared(rollouts: Sequence[Rollout], loss: Grpo) -> tuple[Rollout, ...]:
    """Give each rollout its advantage: also one that is dropped has a part in its group's mean."""
    compared = []
    for group in groups_of(rollouts):
        found = advantages([one.score for one in group], scale_by_spread=loss.scale_by_spread)
        for one, advantage in zip(group, found, strict=True):
            dropped = loss.drop_truncated and one.is_truncated
            compared.append(replace(one, advantage=0.0 if dropped else advantage))
    return tuple(compared)


def count_failed(rollouts: Sequence[Rollout]) -> int:
    """Return how many have no score."""
    return sum(one.score is None for one in rollouts)


def last_failure(rollouts: Sequence[Rollout]) -> Reward | None:
    """Return why the last one without a score has none; None where all have one."""
    failures = [one.reward for one in rollouts if one.score is None]
    return failures[-1] if failures else None


def require_scores(rollouts: Sequence[Rollout], num_failed: int, loss: Grpo) -> None:
    """Raise FailedPrecondition, with the reason and words of the last failure, where too many have no score in all.

    `num_failed` are those of the whole run, these among them.
    """
    last = last_failure(rollouts)
    if last is not None and num_failed >= loss.max_grader_errors:
        most = loss.max_grader_errors
        raise _failed(f"fewer than {most} answers may be without a score, {num_failed} are", last, num_failed)


def require_a_score(rollouts: Sequence[Rollout], what: str) -> None:
    """Raise FailedPrecondition, with the reason and words of the last failure, where none of `what` has a score."""
    last = last_failure(rollouts)
    if last is not None and count_failed(rollouts) == len(rollouts):
        count = len(rollouts)
        raise _failed(f"an answer of {what} must have a score, none of {count} has", last, count)


def _failed(what: str, last: Reward, num_failed: int) -> FailedPrecondition:
    return FailedPrecondition(
        f"{what}; the last of them: {last.message}",
        reason=last.reason or Reason.REWARD_FAILED,
        metadata={"num_grader_errors": str(num_failed)},
    )


def all_cut(rollouts: Sequence[Rollout]) -> bool:
    """Whether nothing is learnt from answers although rewards within a group differ: those that count were cut."""
    spread = any(has_spread([one.score for one in group]) for group in groups_of(rollouts))
    return spread and not any(one.advantage for one in rollouts)


def rollout_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Return what a step's answers were like; nothing of rewards where none has one."""
    scores = [one.score for one in rollouts if one.score is not None]
    groups = groups_of(rollouts)
    idle = sum(not has_spread([one.score for one in group]) for group in groups)
    metrics = {
        "share_without_spread": idle / len(groups),
        # Without the one that stopped it, as in validations.
        "answer_tokens": statistics.fmean(len(one.token_ids) - (not one.is_truncated) for one in rollouts),
        "truncated_share": statistics.fmean(one.is_truncated for one in rollouts),
        "num_taught": float(sum(one.advantage != 0 for one in rollouts)),
        "num_grader_errors": float(len(rollouts) - len(scores)),
    }
    if scores:
        metrics |= {"reward_mean": statistics.fmean(scores), "reward_std": statistics.pstdev(scores)}
    return metrics


def learnt(rollouts: Sequence[Rollout], loss: Grpo) -> list[Rollout]:
    """Return those that pass through the update of a step: nobody where none has an advantage.

    Those without one pass only where they are held to the start.
    """
    if not any(one.advantage for one in rollouts):
        return []
    return [one for one in counted(rollouts, loss) if one.advantage or loss.kl_weight]


def counted(rollouts: Sequence[Rollout], loss: Grpo) -> list[Rollout]:
    """Return those that have a reward and are not dropped."""
    return [
        one for one in rollouts if one.score is not None and not (loss.drop_truncated and one.is_truncated)
    ]


def loss_divisor(rollouts: Sequence[Rollout], loss: Grpo) -> float:
    """Return what the sum over a step's tokens is divided by."""
    if loss.normaliser == "CONSTANT":
        return float(len(rollouts) * loss.max_new_tokens)
    return float(sum(len(one.token_ids) for one in counted(rollouts, loss)))


def packed_rollouts(
    rollouts: Sequence[Rollout],
    micro_batch_tokens: int,
    check: Callable[[], None],
    collective: Collective | None = None,
) -> Iterator[PackedBatch]:
    """Yield prompts with their answers by forward pass, in streams what is learnt; `check` is called before each.

    Of several ranks each takes some of the passes.
    """
    units = [
        Unit(
            number=place,
            rows=(place,),
            num_tokens=len(one.prompt) + len(one.token_ids),
            num_supervised=len(one.token_ids),
        )
        for place, one in enumerate(rollouts)
    ]
    for places, counts in dealt(pack_first_fit(units, micro_batch_tokens), collective or OneRank()):
        check()
        chosen = [rollouts[place] for place in places]
        batch = pack(
            [(*one.prompt, *one.token_ids) for one in chosen],
            {
                WEIGHT: [_behind(one, [1.0] * len(one.token_ids)) for one in chosen],
                ADVANTAGE: [_behind(one, [one.advantage] * len(one.token_ids)) for one in chosen],
                SAMPLER: [_behind(one, one.logprobs) for one in chosen],
            },
            [one.row for one in chosen],
        )
        yield replace(batch, counts=counts)


def _behind(rollout: Rollout, values: Sequence[float]) -> list[float]:
    """Return an answer's values behind a zero for each token of its prompt."""
    return [0.0] * len(rollout.prompt) + list(values)
