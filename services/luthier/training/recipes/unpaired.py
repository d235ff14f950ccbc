"""Preference tuning on single answers (KTO): desirable ones become likelier, undesirable ones less likely.

A unit is an answer, and the same prompt with an answer to another one, which is scored and never learnt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from luthier.lm.packed import PackedBatch
from luthier.lm.readouts import TokenLogprobs
from luthier.training.recipes.batches import pack_first_fit
from luthier.training.recipes.collective import dealt
from luthier.training.recipes.corpus import Corpus, Split
from luthier.training.recipes.course import Course, Event
from luthier.training.recipes.engine import Engine
from luthier.training.recipes.loop import Batches, Loop, Settings, Tally, measured
from luthier.training.recipes.objectives import (
    Kto,
    baseline_objective,
    unpaired_counts,
    unpaired_objective,
)
from luthier.training.recipes.reference import with_reference
from luthier.training.recipes.units import DESIRABLE, MISMATCHED, UNDESIRABLE, UNPAIRED, require_units


def train(
    engine: Engine,
    corpus: Corpus,
    settings: Settings,
    loss: Kto,
    course: Course,
    check: Callable[[], None] = lambda: None,
) -> Iterator[Event]:
    """Make all steps after those of `course`, yielding after each.

    The baseline z of a step is scored over all of it before its first batch is learnt. The reference is the model as
    the weights found it (`Weights.reference`), or what `reference.score_reference` gave the corpus.

    Raises:
        FailedPrecondition: LOSS_NOT_FINITE, ROWS_NOT_OF_METHOD, NO_SUPERVISED_TOKENS, METRIC_NOT_MEASURED.
        Exception: what `check` raised.
    """
    for split in ("TRAIN", "VALIDATION"):
        require_units(corpus.lengths(split), corpus.roles(split), UNPAIRED, settings.mixture)
    loop = Loop(engine, corpus, settings, course, check)
    limit = settings.batches.micro_batch_tokens
    for step in loop.steps():
        parts = _parts(corpus, step.micro_batches, limit, "TRAIN")
        kl = _kl(engine, parts, _compared(engine, corpus, parts.mismatched, "TRAIN", check))
        loop.require_finite("kl", kl, step, [row for rows in parts.mismatched for row in rows])
        objective = unpaired_objective(loss, max(0.0, kl), parts.counts)
        for batch in _compared(engine, corpus, parts.learnt, "TRAIN", check):
            loop.add(batch, engine.accumulate(batch, TokenLogprobs(), objective))
        metrics = _with_margin(loop.update(step, parts.counts))
        metrics |= {"kl": kl, "num_supervised_tokens": float(parts.num_learnt_tokens)}
        metrics |= loop.validate(step, lambda batches: validate(engine, corpus, loss, batches, limit, check))
        yield from loop.finish(step, metrics)


def validate(
    engine: Engine,
    corpus: Corpus,
    loss: Kto,
    batches: Batches,
    limit_tokens: int,
    check: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Return `validation_loss`, rewards of both kinds, their margin and accuracy, and z before it is cut at 0.

    `batches` are validation rows, `limit_tokens` the most of a forward pass; without a row there is nothing.
    """
    parts = _parts(corpus, batches, limit_tokens, "VALIDATION")
    if not parts.learnt:
        return {}
    kl = _kl(engine, parts, _compared(engine, corpus, parts.mismatched, "VALIDATION", check))
    objective = unpaired_objective(loss, max(0.0, kl), parts.counts)
    compared = _compared(engine, corpus, parts.learnt, "VALIDATION", check)
    found = measured(engine, compared, TokenLogprobs(), objective, parts.counts)
    return _with_margin(found, "validation_") | {"validation_kl": kl}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """Rows by what is done with them, by forward pass, and how many of each kind there are.

    Attributes:
        mismatched: what the baseline is scored on.
        learnt: the answers themselves.
        num_mismatched: rows of the first.
        num_learnt_tokens: learnt tokens of the second.
        counts: what divides the sums over the second.
    """

    mismatched: Batches
    learnt: Batches
    num_mismatched: int
    num_learnt_tokens: int
    counts: dict[str, float]


def _parts(corpus: Corpus, batches: Batches, limit_tokens: int, split: Split) -> _Parts:
    """Part the rows of some batches, and pack each part anew, as its rows need not share a pass with the other's."""
    rows = [row for batch in batches for row in batch]
    good, bad, other = (corpus.with_role(rows, role, split) for role in (DESIRABLE, UNDESIRABLE, MISMATCHED))
    return _Parts(
        mismatched=pack_first_fit(other, limit_tokens),
        learnt=pack_first_fit([*good, *bad], limit_tokens),
        num_mismatched=len(other),
        num_learnt_tokens=sum(unit.num_supervised for unit in (*good, *bad)),
        counts=unpaired_counts(len(good), len(bad)),
    )


def _compared(
    engine: Engine, corpus: Corpus, batches: Batches, split: Split, check: Callable[[], None]
) -> Iterator[PackedBatch]:
    """Yield those batches that this rank takes, with the reference's log-probabilities.

    `check` is called before each.
    """
    for rows, counts in dealt(batches, engine.collective):
        check()
        yield with_reference(engine, replace(corpus.pack(rows, split), counts=counts))


def _kl(engine: Engine, parts: _Parts, mismatched: Iterator[PackedBatch]) -> float:
    """Return the mean log-ratio of the answers to other prompts."""
    objective, tally = baseline_objective(parts.num_mismatched), Tally()
    for batch in mismatched:
        tally.add(batch, engine.measure(batch, TokenLogprobs(), objective))
    return tally.means({"kl": parts.num_mismatched}, engine.collective)["kl"]


def _with_margin(metrics: dict[str, float], prefix: str = "") -> dict[str, float]:
    """Add the distance of both kinds' mean rewards, where there are both."""
    sides = [metrics.get(f"{prefix}{name}") for name in ("reward_chosen", "reward_rejected")]
    if sides[0] is not None and sides[1] is not None:
        metrics[f"{prefix}reward_margin"] = sides[0] - sides[1]
    return metrics
