"""What a worker may say of an evaluation: of one that ran, of one that did not come to its end, and of a share."""

from __future__ import annotations

import re

from luthier.evaluation.evaluations.grader_rules import GRADER_RESULT_LIMITS, MAX_GRADERS
from luthier.evaluation.evaluations.judge_rules import JUDGE_RESULT_LIMITS, MAX_JUDGES
from luthier.evaluation.evaluations.rules import MAX_ARMS
from luthier.evaluation.lineage import MAX_VERSIONS
from luthier.grading.suite import OF_A_VERSION, SKILLS
from luthier.runtime.field_limits import (
    ANY,
    DIGEST,
    REQUIRED,
    Limit,
    LimitTable,
    count,
    demanded,
    matching,
    named,
    not_negative,
    under,
    whole,
)
from luthier.runtime.names import ID_LIMIT
from luthier.runtime.result_limits import FILE, TEXT, UNSAID, WARNINGS
from luthier.v1.evaluation_pb2 import ContaminationKind, ScoreDirection, ScoreKind, TemplateSource, Verdict

MAX_SCORES = 256
"""Of an arm. A worker gives a hundred fields scores of their own."""
MAX_COMPARISONS = 10_000
MAX_RECORDS = (1 << 31) - 1
_DATE = matching(re.compile(r"\d{4}-\d{2}-\d{2}"), "a date, YYYY-MM-DD")
_PROBABILITY = not_negative(1)
_RECORDS = whole(0, MAX_RECORDS)
_SKILLS = (*SKILLS, OF_A_VERSION)
_SKILL = Limit(rule=f"must be one of {', '.join(_SKILLS)}", allows=lambda skill: skill in _SKILLS)
_OF_A_SCORE: LimitTable = {
    "score": (REQUIRED, TEXT),
    "lower": ANY,
    "upper": ANY,
    "count": _RECORDS,
    "kind": named(ScoreKind.DESCRIPTOR),
    "direction": named(ScoreDirection.DESCRIPTOR),
    "whole_answer": UNSAID,
}
_ESTIMATE: LimitTable = {**_OF_A_SCORE, "value": ANY, "text_form": ANY}
_APART: LimitTable = {
    "arm_id": demanded(ID_LIMIT),
    "scores": count(MAX_SCORES, "scores"),
    **under("scores[]", _ESTIMATE),
}
_CONTAMINATION: LimitTable = {
    "versions": count(MAX_VERSIONS, "versions"),
    "versions[]": (REQUIRED, TEXT),
    "num_training_records": ANY,
    "num_exact": ANY,
    "num_normalised": ANY,
    "num_ngram": ANY,
    "records": count(1000, "records"),
    "records[].row": ANY,
    "records[].record_id": DIGEST,
    "records[].kind": named(ContaminationKind.DESCRIPTOR),
    "records[].overlap": demanded(_PROBABILITY),
    "records[].version": (REQUIRED, TEXT),
    "records[].filename": TEXT,
    "records[].line": ANY,
    "clean": count(MAX_ARMS, "arms"),
    **under("clean[]", _APART),
    "contaminated": count(MAX_ARMS, "arms"),
    **under("contaminated[]", _APART),
    "unknown_models": count(MAX_ARMS, "models"),
    "unknown_models[]": (REQUIRED, TEXT),
}
_DRIFT: LimitTable = {
    "arm_id": demanded(ID_LIMIT),
    "baseline_arm_id": demanded(ID_LIMIT),
    **under("retained", _ESTIMATE),
    "skills": count(len(SKILLS), "skills"),
    "skills[].skill": demanded(_SKILL),
    "skills[].num_asked": ANY,
    "skills[].num_known": ANY,
    "skills[].num_kept": ANY,
    "skills[].num_gained": ANY,
    **under("divergence", _ESTIMATE),
    **under("greedy_divergence", _ESTIMATE),
    "num_drawn_tokens": ANY,
    **under("exact_divergence", _ESTIMATE),
    "num_compared_tokens": ANY,
    "num_unanswered": _RECORDS,
    **under("text_loss", _ESTIMATE),
    "baseline_text_bits": ANY,
}
RESULT_LIMITS: LimitTable = {
    "arm_results": count(MAX_ARMS, "arms", least=1),
    "arm_results[].arm_id": demanded(ID_LIMIT),
    "arm_results[].scores": count(MAX_SCORES, "scores"),
    **under("arm_results[].scores[]", _ESTIMATE),
    "arm_results[].num_generated_tokens": ANY,
    "arm_results[].num_prompt_tokens": ANY,
    "arm_results[].duration_seconds": ANY,
    "arm_results[].num_cut": ANY,
    "arm_results[].template_source": named(TemplateSource.DESCRIPTOR),
    "arm_results[].template_digest": DIGEST,
    "arm_results[].template_date": demanded(_DATE),
    "arm_results[].num_errors": _RECORDS,
    "arm_results[].tokens_per_second": ANY,
    "comparisons": count(MAX_COMPARISONS, "comparisons"),
    "comparisons[].candidate_arm_id": demanded(ID_LIMIT),
    "comparisons[].baseline_arm_id": demanded(ID_LIMIT),
    **under("comparisons[]", _OF_A_SCORE),
    "comparisons[].difference": ANY,
    "comparisons[].p_value": _PROBABILITY,
    "comparisons[].verdict": named(Verdict.DESCRIPTOR),
    "comparisons[].confidence": Limit(rule="must be in (0, 1)", allows=lambda value: 0 < value < 1),
    "comparisons[].adjusted_p_value": _PROBABILITY,
    "comparisons[].method": ANY,
    "comparisons[].primary": ANY,
    "comparisons[].num_lost_candidate": _RECORDS,
    "comparisons[].num_lost_baseline": _RECORDS,
    "comparisons[].num_lost_both": _RECORDS,
    "num_records": demanded(whole(1, MAX_RECORDS)),
    "predictions": REQUIRED,
    **under("predictions", FILE),
    **under("contamination", _CONTAMINATION),
    "drift_results": count(MAX_ARMS, "arms"),
    **under("drift_results[]", _DRIFT),
    "judge_results": count(MAX_JUDGES, "judges"),
    **under("judge_results[]", JUDGE_RESULT_LIMITS),
    "grader_results": count(MAX_GRADERS, "graders"),
    **under("grader_results[]", GRADER_RESULT_LIMITS),
    **WARNINGS,
}
"""What a worker may say of an evaluation that it ran, or could not run to its end."""
SHARE_LIMITS: LimitTable = {
    "num_records": demanded(whole(1, MAX_RECORDS)),
    "predictions": REQUIRED,
    **under("predictions", FILE),
}
"""What a worker may say of a share of an evaluation, answered or not."""
