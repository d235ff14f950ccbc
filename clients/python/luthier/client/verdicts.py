"""Verdicts in words: whether tuning was worth it, and how sure each comparison is."""

from __future__ import annotations

from luthier.v1.evaluation_pb2 import Comparison, Evaluation
from luthier.v1.verdict_pb2 import EvaluationVerdict

_DEFAULT_CONFIDENCE = 0.95
_GOOD = (EvaluationVerdict.OUTCOME_FINE_TUNE_WINS,)
_BAD = (EvaluationVerdict.OUTCOME_PROMPTING_SUFFICES, EvaluationVerdict.OUTCOME_REGRESSED)


def outcome_word(verdict: EvaluationVerdict) -> str:
    """Return an outcome as people say it, e.g. `fine tune wins`; empty where there is no verdict."""
    if not verdict.outcome:
        return ""
    name = EvaluationVerdict.Outcome.Name(verdict.outcome)
    return name.removeprefix("OUTCOME_").replace("_", " ").lower()


def outcome_class(verdict: EvaluationVerdict) -> str:
    """Return `better` or `worse` as an outcome speaks for tuning or against it; empty for neither."""
    return "better" if verdict.outcome in _GOOD else "worse" if verdict.outcome in _BAD else ""


def p_value_words(comparison: Comparison) -> str:
    """Return the p-value that goes with a comparison's verdict: the corrected one where there is one."""
    if comparison.HasField("adjusted_p_value"):
        return f"{comparison.adjusted_p_value:.2g}"
    return f"{comparison.p_value:.2g}" if comparison.HasField("p_value") else ""


def confidence_words(comparison: Comparison) -> str:
    """Return the confidence of a comparison's interval, e.g. `99.5 %`."""
    return f"{100 * (comparison.confidence or _DEFAULT_CONFIDENCE):.4g} %"


def judged_arms(evaluation: Evaluation) -> tuple[str, str]:
    """Return the two arms that matter most: the judged one and the one that decided, else the last and the first.

    Empty names where there are no two.
    """
    verdict, arms = evaluation.verdict, [arm.arm_id for arm in evaluation.arms]
    if verdict.candidate_arm_id and verdict.rival_arm_id:
        return verdict.candidate_arm_id, verdict.rival_arm_id
    return (arms[-1], arms[0]) if len(arms) > 1 else ("", "")
