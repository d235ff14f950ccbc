"""How often a verdict is wrong, of evaluations whose truth is known: several prompting arms, guards, many scores.

Seeds were fixed before anything was measured. The whole, 10,000 evaluations a case, is marked slow; the normal run
takes few, and is there to find what is plainly wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray

from luthier.evaluation.evaluations.verdicts import verdict_of
from luthier.evaluation.worker.comparing import comparisons_of
from luthier.evaluation.worker.scoring import Answer
from luthier.grading.metrics import paired_binary
from luthier.v1.evaluation_pb2 import Evaluation, EvaluationArm
from luthier.v1.verdict_pb2 import EvaluationVerdict, Guard, GuardResult, ScoreGuard

Outcome = EvaluationVerdict.Outcome
Right = NDArray[np.bool_]
STATED = 0.025
"""Of each side of a two-sided 95 %."""
NUM_SETS = [200, pytest.param(10_000, marks=pytest.mark.slow)]
PARSED = "field_match.parsed"


@pytest.fixture(autouse=True)
def _remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds of the same counts are asked for again and again."""
    monkeypatch.setattr(paired_binary, "bounds", cache(paired_binary.bounds))


def slack(num_sets: int) -> float:
    return (2.5 if num_sets >= 10_000 else 4.0) * float(np.sqrt(STATED * (1 - STATED) / num_sets))


def generators(seed: int, num_sets: int) -> list[np.random.Generator]:
    parent = np.random.SeedSequence([20261129, seed])
    return [np.random.Generator(np.random.Philox(child)) for child in parent.spawn(num_sets)]


def flipped(generator: np.random.Generator, right: Right, chance: float) -> Right:
    """Return who is right where each record is seen otherwise by chance: as good on average, of half of them right."""
    return right ^ (generator.random(len(right)) < chance)


def mended(generator: np.random.Generator, right: Right, by: float) -> Right:
    """Return who is right where half were, and `by` more are on average."""
    return right | (generator.random(len(right)) < 2 * by)


def evaluation_of(
    prompting: list[Right], tuned: Right, *, smallest: float = 0.0, guards: tuple[Guard, ...] = ()
) -> tuple[Evaluation, dict[str, list[dict[str, float]]]]:
    arms = {f"prompt-{number}": right for number, right in enumerate(prompting)} | {"tuned": tuned}
    evaluation = Evaluation(
        arms=[EvaluationArm(arm_id=arm_id, tuned=arm_id == "tuned") for arm_id in arms],
        primary_score="exact_match",
        candidate_arm_id="tuned",
        smallest_difference=smallest,
        guards=guards,
    )
    return evaluation, {arm: [{"exact_match": float(one)} for one in right] for arm, right in arms.items()}


def judged(evaluation: Evaluation, scores: dict[str, list[dict[str, float]]]) -> EvaluationVerdict:
    answers = {
        arm_id: [Answer(text="", finish_reason="STOP", scores=one) for one in rows]
        for arm_id, rows in scores.items()
    }
    evaluation.comparisons.extend(comparisons_of(evaluation, answers))
    return verdict_of(evaluation)


def rates(
    seed: int, num_sets: int, draw: Callable[[np.random.Generator], EvaluationVerdict]
) -> dict[Outcome.ValueType, float]:
    """Return how often each outcome is said."""
    found = Counter(draw(generator).outcome for generator in generators(seed, num_sets))
    return {outcome: found[outcome] / num_sets for outcome in Outcome.values()}


@pytest.mark.parametrize("num_sets", NUM_SETS)
@pytest.mark.parametrize("num_arms", [1, 3])
def test_no_more_wins_than_stated_where_one_prompting_arm_is_as_good(num_arms: int, num_sets: int) -> None:
    """The others are far behind, so that nothing but the comparison with that one arm keeps a win away."""

    def draw(generator: np.random.Generator) -> EvaluationVerdict:
        right = generator.random(48) < 0.5
        behind = [right & (generator.random(48) < 0.1) for _ in range(num_arms - 1)]
        return judged(
            *evaluation_of([flipped(generator, right, 0.15), *behind], flipped(generator, right, 0.15))
        )

    found = rates(num_arms, num_sets, draw)
    assert found[Outcome.OUTCOME_FINE_TUNE_WINS] <= STATED + slack(num_sets)
    assert found[Outcome.OUTCOME_PROMPTING_SUFFICES] <= STATED + slack(num_sets)


@pytest.mark.parametrize("num_sets", NUM_SETS)
def test_that_one_of_five_prompting_arms_is_better_is_said_no_more_often_than_stated(num_sets: int) -> None:
    def draw(generator: np.random.Generator) -> EvaluationVerdict:
        right = generator.random(48) < 0.5
        return judged(
            *evaluation_of(
                [flipped(generator, right, 0.15) for _ in range(5)], flipped(generator, right, 0.15)
            )
        )

    found = rates(11, num_sets, draw)
    assert found[Outcome.OUTCOME_PROMPTING_SUFFICES] <= STATED + slack(num_sets)
    assert found[Outcome.OUTCOME_FINE_TUNE_WINS] <= STATED + slack(num_sets)


@pytest.mark.parametrize("num_sets", NUM_SETS)
def test_that_nothing_matters_is_said_no_more_often_than_stated_where_it_just_matters(num_sets: int) -> None:
    """The candidate is better than each of five by just what matters; any one of them is enough for a false word.

    With intervals of 95 % each, as beside a win, one of ten such evaluations said that there is no difference.
    """

    def draw(generator: np.random.Generator) -> EvaluationVerdict:
        right = generator.random(400) < 0.5
        prompting = [flipped(generator, right, 0.1) for _ in range(5)]
        tuned = mended(generator, flipped(generator, right, 0.1), 0.1)
        return judged(*evaluation_of(prompting, tuned, smallest=0.1))

    found = rates(12, num_sets, draw)
    wrong = found[Outcome.OUTCOME_NO_DIFFERENCE] + found[Outcome.OUTCOME_PROMPTING_SUFFICES]
    assert wrong <= STATED + slack(num_sets)
    assert found[Outcome.OUTCOME_FINE_TUNE_WINS] > 0.5


def guarded(generator: np.random.Generator, loss: float, limit: float, num_others: int) -> EvaluationVerdict:
    """Return the verdict of a clear win that loses `loss` of a guarded score, beside `num_others` other scores."""
    guard = Guard(score=ScoreGuard(score=PARSED, max_loss=limit))
    right = generator.random(100) < 0.5
    evaluation, scores = evaluation_of([right], right | (generator.random(100) < 0.9), guards=(guard,))
    lost = generator.random(100) < loss + 0.05
    gained = generator.random(100) < 0.05
    for row in range(100):
        # A record that is right for neither, both or one: five in a hundred are gained whatever is lost.
        scores["prompt-0"][row][PARSED] = float(not gained[row] or lost[row])
        scores["tuned"][row][PARSED] = float(not lost[row] or gained[row])
        for number in range(num_others):
            for rows in scores.values():
                rows[row][f"field_match.field.f{number}"] = 1.0
    return judged(evaluation, scores)


@pytest.mark.parametrize("num_sets", NUM_SETS)
def test_a_guard_at_its_very_limit_is_called_broken_or_held_no_more_often_than_stated(num_sets: int) -> None:
    def draw(generator: np.random.Generator) -> EvaluationVerdict:
        # Lost or gained and not both: 0.2 * 0.95 less 0.05 * 0.8.
        return guarded(generator, 0.15, 0.15, 0)

    verdicts = [draw(generator) for generator in generators(13, num_sets)]
    standings = Counter(one.guards[0].standing for one in verdicts)
    assert standings[GuardResult.STANDING_BROKEN] / num_sets <= STATED + slack(num_sets)
    assert standings[GuardResult.STANDING_HELD] / num_sets <= STATED + slack(num_sets)
    regressed = sum(one.outcome == Outcome.OUTCOME_REGRESSED for one in verdicts)
    assert regressed == standings[GuardResult.STANDING_BROKEN]


@pytest.mark.parametrize("num_others", [0, 70])
def test_a_clear_loss_is_seen_as_often_whatever_else_is_measured(num_others: int) -> None:
    """Corrected for seventy other comparisons most of such losses were not settled."""
    found = rates(14, 30, lambda generator: guarded(generator, 0.25, 0.1, num_others))
    assert found[Outcome.OUTCOME_REGRESSED] >= 0.7
