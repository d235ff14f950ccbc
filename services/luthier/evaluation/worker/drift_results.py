"""How far a tuned arm has drifted, of the records of what it and the baseline said and found."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from luthier.evaluation.worker.drift_suite import Suite
from luthier.evaluation.worker.scoring import real_estimate, share_estimate
from luthier.grading.metrics.intervals import MIN_PAIRS, Interval, wilson
from luthier.grading.metrics.paired import rate_difference
from luthier.grading.suite import general_texts
from luthier.v1.evaluation_pb2 import DriftResult, SkillDrift
from luthier.worker.v1 import task_pb2

RETAINED = "retained"
DIVERGENCE = "divergence"
GREEDY_DIVERGENCE = "greedy_divergence"
EXACT_DIVERGENCE = "exact_divergence"
TEXT_LOSS = "text_loss"
_CONFIDENCE = 0.95
Records = Sequence[task_pb2.AnsweredRecord]
Pairs = Sequence[tuple[task_pb2.AnsweredRecord, task_pb2.AnsweredRecord]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmRecords:
    """What an arm said and found.

    Attributes:
        said: its answers to the questions.
        found: what it found of the baseline's answers: of the most likely ones, then of those that were drawn; None:
            its tokens are others.
        read: what it found of the general texts.
        compared: how far it lies from the baseline with all words counted; empty: nobody looked.
    """

    said: Records
    found: Records | None
    read: Records
    compared: Records = ()


def drift_of(result: DriftResult, suite: Suite, mine: ArmRecords, baseline: ArmRecords) -> DriftResult:
    """Fill a result in, and return it; `suite` is what was asked."""
    _add_retained(result, suite, mine.said, baseline.said)
    if mine.found is not None and baseline.found is not None:
        pairs = list(zip(mine.found, baseline.found, strict=True))
        count = len(suite.questions)
        likely, drawn = pairs[:count], pairs[count:]
        _add_divergence(result, GREEDY_DIVERGENCE, likely)
        _add_divergence(result, DIVERGENCE, drawn)
        result.num_drawn_tokens = sum(other.num_reference_tokens for _, other in drawn)
        _add_exact(result, mine.compared)
    _add_text_loss(result, list(zip(mine.read, baseline.read, strict=True)))
    return result


def drift_warnings(arm_id: str, records: ArmRecords, *, is_baseline: bool) -> Iterator[str]:
    """Yield what keeps the drift of an arm, or with the baseline that of all, from being measured."""
    lost = (
        "which count in nothing"
        if is_baseline
        else "which count as forgotten where the baseline has them right"
    )
    unset = "which are left out" if is_baseline else "so that this is not measured"
    parts = (
        (records.said, f"could not answer {{}} questions of the suite, {lost}"),
        (records.found or (), f"has no finite likelihood for {{}} answers of the baseline, {unset}"),
        (records.read, f"has no finite likelihood for {{}} general texts, {unset}"),
        (records.compared, f"could not be compared word by word on {{}} answers of the baseline, {unset}"),
    )
    for all_of_them, words in parts:
        failed = [record for record in all_of_them if record.HasField("error")]
        if failed:
            count = f"{len(failed)} of {len(all_of_them)}"
            yield f"drift: arm {arm_id} {words.format(count)}; the first: {failed[0].error.message}"
    known = [one for one in records.compared if one.num_reference_tokens]
    if 0 < len(known) == len(records.compared) < MIN_PAIRS:
        yield (
            f"drift: arm {arm_id} was compared word by word on {len(known)} answers of the baseline, which are too few "
            f"to tell how sure that is: at least {MIN_PAIRS} are needed"
        )


def _add_retained(result: DriftResult, suite: Suite, mine: Records, baseline: Records) -> None:
    result.num_unanswered = sum(other.HasField("error") for other in baseline)
    by_skill = {skill: SkillDrift(skill=skill) for skill in suite.kinds}
    for skill, is_right, one, other in zip(suite.skills, suite.graders, mine, baseline, strict=True):
        if not other.HasField("error"):
            # What an arm can no longer answer at all is forgotten: else failing would look like retaining.
            is_kept = not one.HasField("error") and is_right(one.text)
            _count(by_skill[skill], is_kept, is_right(other.text))
    result.skills.extend(one for one in by_skill.values() if one.num_asked)
    num_known = sum(one.num_known for one in result.skills)
    if num_known:
        kept = wilson(sum(one.num_kept for one in result.skills), num_known)
        result.retained.CopyFrom(share_estimate(RETAINED, kept))


def _add_divergence(result: DriftResult, name: str, pairs: Pairs) -> None:
    known = [(one, other) for one, other in pairs if other.num_reference_tokens]
    if known and not _has_failed(known):
        interval = _loss(known, [other.num_reference_tokens for _, other in known])
        getattr(result, name).CopyFrom(real_estimate(name, interval))


def _add_exact(result: DriftResult, compared: Records) -> None:
    if not compared or any(one.HasField("error") for one in compared):
        return
    known = [one for one in compared if one.num_reference_tokens]
    if len(known) < MIN_PAIRS:
        return
    tokens = [one.num_reference_tokens for one in known]
    nothing = [0.0] * len(tokens)
    found = rate_difference([one.nll for one in known], nothing, tokens).interval(_CONFIDENCE).told()
    # No divergence is below 0; what rounding and the interval's symmetry say of there is known to be wrong.
    value, lower, upper = (max(0.0, one) for one in (found.value, found.lower, found.upper))
    interval = Interval(value=value, lower=lower, upper=upper, count=found.count)
    result.exact_divergence.CopyFrom(real_estimate(EXACT_DIVERGENCE, interval))
    result.num_compared_tokens = sum(tokens)


def _add_text_loss(result: DriftResult, pairs: Pairs) -> None:
    sizes = [len(text.encode()) * math.log(2) for text in general_texts()]
    known = [(pair, size) for pair, size in zip(pairs, sizes, strict=True) if not pair[1].HasField("error")]
    if not known:
        return
    read, bits = [pair for pair, _ in known], [size for _, size in known]
    result.baseline_text_bits = sum(other.nll for _, other in read) / sum(bits)
    if not _has_failed(read):
        result.text_loss.CopyFrom(real_estimate(TEXT_LOSS, _loss(read, bits)))


def _has_failed(pairs: Pairs) -> bool:
    """Whether the tuned arm has no finite number for one: those for which it has one would flatter it."""
    return any(one.HasField("error") for one, _ in pairs)


def _loss(pairs: Pairs, sizes: Sequence[float]) -> Interval:
    """Return by how much less likely the tuned arm finds all of it, for one of `sizes`."""
    mine, baseline = [one.nll for one, _ in pairs], [other.nll for _, other in pairs]
    return rate_difference(mine, baseline, sizes).interval(_CONFIDENCE).told()


def _count(skill: SkillDrift, mine: bool, other: bool) -> None:
    skill.num_asked += 1
    skill.num_known += other
    skill.num_kept += mine and other
    skill.num_gained += mine and not other
