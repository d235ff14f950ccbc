"""Drift in words: what a tuned arm retains of general abilities, and how far its answers have moved."""

from __future__ import annotations

from collections.abc import Iterator

from luthier.client.scores import estimate_words, has_bounds
from luthier.v1.evaluation_pb2 import DriftResult


def retained_words(result: DriftResult) -> str:
    """Return `91.2 % [83.4, 95.5] of 80, 3 gained`; says so where the baseline can do none, or was not asked."""
    if not any(skill.num_asked for skill in result.skills):
        return f"not measured: {result.baseline_arm_id} answered no question"
    if not result.HasField("retained"):
        return f"nothing to retain: {result.baseline_arm_id} has no question right"
    num_gained = sum(skill.num_gained for skill in result.skills)
    gained = f", {num_gained:,} gained" if num_gained else ""
    return f"{estimate_words(result.retained)} of {result.retained.count:,}{gained}"


def skill_words(result: DriftResult) -> Iterator[tuple[str, str]]:
    """Yield each skill with `kept of known` and how many the arm has right that the baseline has not."""
    for skill in result.skills:
        gained = f", {skill.num_gained:,} gained" if skill.num_gained else ""
        yield skill.skill, f"{skill.num_kept:,} of {skill.num_known:,}{gained}"


def divergence_words(result: DriftResult) -> str:
    """Return the divergence with its interval, in nats per token; says so where it was not measured."""
    if not result.HasField("divergence"):
        return _unmeasured(result)
    drawn = f"{estimate_words(result.divergence)} nats per token"
    if not result.HasField("exact_divergence"):
        return drawn
    exact = estimate_words(result.exact_divergence)
    return f"{drawn}; all words compared at {result.num_compared_tokens:,} tokens: {exact}"


def text_loss_words(result: DriftResult) -> str:
    """Return by how many bits a byte general text became less likely; says so where that was not measured."""
    if not result.HasField("text_loss"):
        return "not measured"
    loss = result.text_loss
    bounds = f" [{loss.lower:+.3g}, {loss.upper:+.3g}]" if has_bounds(loss) else ""
    return f"{loss.value:+.3g}{bounds} on {result.baseline_text_bits:.3g} bits a byte"


def _unmeasured(result: DriftResult) -> str:
    """Say why there is no divergence: arms of the same tokens have found something of what was said, or failed."""
    if result.num_drawn_tokens or result.HasField("greedy_divergence"):
        return "not measured: see the warnings"
    return "not measured: other tokens" if result.HasField("retained") else "not measured"
