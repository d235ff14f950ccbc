"""Data sets of two arms whose true difference is known, with seeds that were fixed before anything was measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from luthier.grading.metrics import paired_binary, paired_share
from luthier.grading.metrics.intervals import Interval
from luthier.grading.metrics.means import perplexity
from luthier.grading.metrics.paired import PairedDifference, perplexity_difference, rate_difference

Array = NDArray[np.float64]
COUNTS = (12, 48, 200)
DISCORDANCES = (0.05, 0.1, 0.2, 0.3, 0.5)
LOPSIDED = ((0.1, 0.9), (0.2, 1.0), (0.05, 0.5), (0.1, 0.3), (0.02, 1.0))
"""What a candidate gains on many records and loses on few."""
ALPHA = 0.05
_SEED = 20261129
NATS, GAIN = 1.5, 0.3
"""Nats a token of the baseline, and how many fewer a better candidate has."""
TEXTS = {
    "one length": ((40,), 0.25),
    "30 to 50 tokens": ((30, 40, 50), 0.25),
    "20 to 80 tokens": ((20, 40, 80), 0.35),
    "5 to 160 tokens": ((5, 10, 20, 40, 80, 160), 0.35),
    "heavy tails": ((5, 10, 20, 40, 80, 160), 1.0),
}
"""Numbers of tokens that records have, and how far the logarithm of their nats a token scatters."""
_OWN_SCATTER = 0.2


@dataclass(frozen=True, kw_only=True)
class Case:
    """`count` records, on a share `discordance` of which the arms differ, `tilt` of those in favour of the candidate.

    `sizes`: by how much they differ there, each as likely as the others. A single size of 1: scores of right or wrong.
    """

    count: int
    discordance: float
    tilt: float
    sizes: tuple[float, ...] = (1.0,)

    @property
    def truth(self) -> float:
        return self.discordance * (2 * self.tilt - 1) * float(np.mean(self.sizes))

    def differences(self, num_sets: int) -> Array:
        """Return candidate minus baseline, a row for each data set."""
        key = [_SEED, self.count, round(1000 * self.discordance), round(1000 * self.tilt), len(self.sizes)]
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
        shape = (num_sets, self.count)
        signs = np.where(generator.random(shape) < self.tilt, 1.0, -1.0)
        differ = generator.random(shape) < self.discordance
        found: Array = differ * signs * generator.choice(np.array(self.sizes), shape)
        return found


@dataclass(frozen=True, kw_only=True)
class Lopsided:
    """Arms that are as good as each other, though the candidate gains little on many records and loses much on few."""

    count: int
    discordance: float
    gain: float
    loss: float
    truth: float = 0.0

    def differences(self, num_sets: int) -> Array:
        """Return candidate minus baseline, a row for each data set."""
        key = [_SEED, self.count, *(round(1000 * each) for each in (self.discordance, self.gain, self.loss))]
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
        drawn = generator.random((num_sets, self.count))
        lost = self.discordance * self.gain / (self.gain + self.loss)
        found: Array = np.where(drawn < lost, -self.loss, np.where(drawn < self.discordance, self.gain, 0.0))
        return found


@dataclass(frozen=True, kw_only=True)
class Texts:
    """References of two arms: their tokens, as many for both, and how likely each arm finds them.

    Nats a token are log-normal over records: what makes a record hard is the same for both arms, and each has a little
    of its own besides. `gain`: by how many nats a token the candidate is better.
    """

    name: str
    count: int
    gain: float = 0.0

    def sides(self, num_sets: int) -> tuple[Array, Array, Array]:
        """Return tokens, and negative log-likelihoods of baseline and candidate: a row for each data set."""
        sizes, scatter = TEXTS[self.name]
        key = [_SEED, self.count, len(sizes), max(sizes), round(1000 * scatter), round(1000 * self.gain)]
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
        shape = (num_sets, self.count)
        tokens = generator.choice(np.array(sizes, dtype=np.float64), shape)

        def around_one(deviation: float) -> Array:
            found: Array = np.exp(deviation * generator.standard_normal(shape) - deviation**2 / 2)
            return found

        common = tokens * around_one(scatter)
        baseline, candidate = (nats * common * around_one(_OWN_SCATTER) for nats in (NATS, NATS - self.gain))
        return tokens, baseline, candidate


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Share of data sets whose interval holds the truth, and in which the candidate is called better, or worse."""

    coverage: float
    wins: float
    losses: float


def cases(sizes: tuple[float, ...] = (1.0,), tilts: tuple[float, ...] = (0.5, 0.75, 1.0)) -> Iterator[Case]:
    for count in COUNTS:
        for discordance in DISCORDANCES:
            for tilt in tilts:
                yield Case(count=count, discordance=discordance, tilt=tilt, sizes=sizes)


def lopsided(
    shapes: Sequence[tuple[float, float]] = LOPSIDED,
    counts: Sequence[int] = COUNTS,
    discordances: Sequence[float] = DISCORDANCES,
) -> Iterator[Lopsided]:
    for count in counts:
        for discordance in discordances:
            for gain, loss in shapes:
                yield Lopsided(count=count, discordance=discordance, gain=gain, loss=loss)


def measured(case: Case | Lopsided, num_sets: int) -> Measured:
    """Draw data sets and test each of them."""
    differences = case.differences(num_sets)
    if isinstance(case, Case) and case.sizes == (1.0,):
        gained, lost = (differences > 0).sum(axis=1), (differences < 0).sum(axis=1)
        at_truth = paired_binary.p_values(gained, lost, case.count, case.truth)
        at_zero = paired_binary.p_values(gained, lost, case.count)
    else:
        at_truth = paired_share.p_values(differences, case.truth)
        at_zero = paired_share.p_values(differences)
    told, is_up = at_zero <= ALPHA, differences.mean(axis=1) > 0
    return Measured(
        coverage=float((at_truth > ALPHA).mean()),
        wins=float((told & is_up).mean()),
        losses=float((told & ~is_up).mean()),
    )


def measured_texts(case: Texts, num_sets: int) -> dict[str, Measured]:
    """Draw data sets and measure each as an evaluation does: the baseline alone, and the difference of both arms.

    A win is the candidate's, which is better where it is lower.
    """
    found: dict[str, list[tuple[bool, bool, bool]]] = {"alone": [], "perplexity": [], "bits": []}
    truth = float(np.exp(NATS - case.gain) - np.exp(NATS))
    for tokens, baseline, candidate in zip(*case.sides(num_sets), strict=True):
        alone = perplexity(baseline, tokens)
        found["alone"].append(_told(alone, float(np.exp(NATS))))
        of_perplexities = perplexity_difference((candidate, tokens), (baseline, tokens))
        found["perplexity"].append(_told_of(of_perplexities, truth))
        of_rates = rate_difference(candidate, baseline, tokens)
        found["bits"].append(_told_of(of_rates, -case.gain))
    return {
        name: Measured(
            **dict(zip(("coverage", "wins", "losses"), np.mean(each, axis=0).tolist(), strict=True))
        )
        for name, each in found.items()
    }


def _told(interval: Interval, truth: float) -> tuple[bool, bool, bool]:
    return interval.lower <= truth <= interval.upper, interval.upper < 0, interval.lower > 0


def _told_of(difference: PairedDifference, truth: float) -> tuple[bool, bool, bool]:
    interval = difference.interval(1 - ALPHA)
    assert (difference.p_value <= ALPHA) == (not interval.lower <= 0 <= interval.upper)
    return _told(interval, truth)


def texts_table(num_sets: int) -> Iterator[str]:
    """Yield the lines of a table for people: coverage alone, and of differences without and with a gain; false wins."""
    yield "| records | number | perplexity alone | difference of perplexities | of bits a byte |"
    yield "|---|---|---|---|---|"
    for name in TEXTS:
        for count in COUNTS:
            none, gain = (
                measured_texts(Texts(name=name, count=count, gain=one), num_sets) for one in (0.0, GAIN)
            )
            cells = [
                f"{100 * none[kind].coverage:.1f}, {100 * gain[kind].coverage:.1f}; {100 * none[kind].wins:.2f}"
                for kind in ("perplexity", "bits")
            ]
            yield f"| {name} | {count} | {100 * none['alone'].coverage:.1f} | {' | '.join(cells)} |"


def table(num_sets: int) -> Iterator[str]:
    """Yield the lines of a table for people: the range of the coverage over tilts, and false wins, by discordance.

    Of lopsided shares the range and the most false wins over their shapes.
    """
    head = " | ".join(f"{100 * discordance:.0f} %" for discordance in DISCORDANCES)
    yield f"| | records | {head} |"
    yield "|---" * (2 + len(DISCORDANCES)) + "|"
    for name, sizes in (("right or wrong", (1.0,)), ("shares", (0.2, 0.4, 0.6, 0.8, 1.0))):
        for count in COUNTS:
            cells = []
            for discordance in DISCORDANCES:
                found = [
                    measured(Case(count=count, discordance=discordance, tilt=tilt, sizes=sizes), num_sets)
                    for tilt in (0.5, 0.75, 1.0)
                ]
                coverage = sorted(100 * one.coverage for one in found)
                cells.append(f"{coverage[0]:.1f} to {coverage[-1]:.1f}; {100 * found[0].wins:.2f}")
            yield f"| {name} | {count} | {' | '.join(cells)} |"
    for count in COUNTS:
        cells = []
        for discordance in DISCORDANCES:
            found = [measured(case, num_sets) for case in lopsided(LOPSIDED, [count], [discordance])]
            coverage = sorted(100 * one.coverage for one in found)
            wins = max(100 * one.wins for one in found)
            cells.append(f"{coverage[0]:.1f} to {coverage[-1]:.1f}; {wins:.2f}")
        yield f"| lopsided shares | {count} | {' | '.join(cells)} |"


if __name__ == "__main__":
    print("\n".join((*table(10_000), "", *texts_table(10_000))))
