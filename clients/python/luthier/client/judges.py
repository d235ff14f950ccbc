"""Judges in words: how often they gave nothing, and how far they can be trusted."""

from __future__ import annotations

from luthier.v1.judge_pb2 import (
    JUDGE_PREFERENCE_FIRST,
    JUDGE_PREFERENCE_SECOND,
    JudgedPair,
    JudgeEstimate,
    Judgement,
    JudgeResult,
)


def error_words(result: JudgeResult) -> str:
    """Return `3 of 96: 2 JUDGE_ANSWER_INVALID, 1 JUDGE_UNAVAILABLE`; `0 of 96` where it always judged."""
    told = ", ".join(f"{one.count:,} {one.reason}" for one in result.errors)
    return f"{result.num_errors:,} of {result.num_asked:,}{f': {told}' if told else ''}"


def agreement_words(result: JudgeResult) -> str:
    """Return in what share of the pairs both orders say the same, and in what share that is a tie.

    Empty of a judge of single answers. A judge that finds everything alike agrees with itself, and tells nothing.
    """
    if not result.HasField("agreement"):
        return ""
    num_judged = sum(pair.num_wins + pair.num_ties + pair.num_losses for pair in result.pairs)
    num_ties = sum(pair.num_ties - pair.num_contradictions for pair in result.pairs)
    ties = f", {100 * num_ties / num_judged:.1f} % of the pairs ties" if num_judged else ""
    return _percent(result.agreement) + ties


def bias_words(result: JudgeResult) -> str:
    """Return how much more often the answer shown first is preferred, in percentage points; empty likewise."""
    if not result.HasField("position_bias"):
        return ""
    bias = result.position_bias
    return f"{100 * bias.value:+.1f} pp [{100 * bias.lower:+.1f}, {100 * bias.upper:+.1f}]"


def cost_words(result: JudgeResult) -> str:
    """Return `128 calls (41 repeated), 40,312 tokens read, 3,120 written`; empty where nothing was counted.

    A model of the project is called by nobody, and an endpoint need not say what it read.
    """
    told = []
    if result.num_calls:
        repeated = f" ({result.num_repeated_calls:,} repeated)" if result.num_repeated_calls else ""
        told.append(f"{result.num_calls:,} calls{repeated}")
    if result.num_prompt_tokens or result.num_generated_tokens:
        told.append(f"{result.num_prompt_tokens:,} tokens read, {result.num_generated_tokens:,} written")
    return ", ".join(told)


def pair_words(pair: JudgedPair) -> str:
    """Return `tuned against zero: 20 wins, 5 ties (2 contradictions), 7 losses, 1 not judged`."""
    contradictions = f" ({pair.num_contradictions:,} contradictions)" if pair.num_contradictions else ""
    lost = f", {pair.num_errors:,} not judged" if pair.num_errors else ""
    return (
        f"{pair.arm_id} against {pair.rival_arm_id}: {pair.num_wins:,} wins, {pair.num_ties:,} ties{contradictions}, "
        f"{pair.num_losses:,} losses{lost}"
    )


def judgement_words(one: Judgement) -> str:
    """Return what came of one judgement: `zero better than tuned`, `zero: 4`, or why there is none."""
    whose = f"{one.arm_id}, then {one.rival_arm_id}" if one.rival_arm_id else one.arm_id
    if one.HasField("error"):
        return f"{whose}: {one.error.message}"
    if one.HasField("number"):
        return f"{whose}: {one.number:g}"
    if one.preference == JUDGE_PREFERENCE_FIRST:
        return f"{whose}: {one.arm_id} is better"
    if one.preference == JUDGE_PREFERENCE_SECOND:
        return f"{whose}: {one.rival_arm_id} is better"
    return f"{whose}: tie"


def _percent(estimate: JudgeEstimate) -> str:
    bounds = f"[{100 * estimate.lower:.1f}, {100 * estimate.upper:.1f}]"
    return f"{100 * estimate.value:.1f} % {bounds} of {estimate.count:,}"
