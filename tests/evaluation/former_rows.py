"""The bodies of evaluations that were rows of JSON."""

from __future__ import annotations

from typing import Any

P = "projects/default"
ESTIMATE = {"value": 0.5, "lower": 0.25, "upper": 0.75, "count": 9}
DIFFERENCE = {"difference": 0.25, "lower": 0.125, "upper": 0.5, "count": 9}
# What was stored at first, before later versions added fields.
OLDEST: dict[str, Any] = {
    "dataset_version": f"{P}/datasets/d/versions/v",
    "arms": [{"arm_id": "zero", "model": f"{P}/models/base", "num_shots": 0}],
    "display_name": "",
    "split": "TEST",
    "max_records": 0,
    "seed": 0,
    "metrics": ["EXACT_MATCH"],
    "max_new_tokens": 256,
    "base_model": f"{P}/models/base",
    "dataset_digest": "dv",
    "model_digests": {f"{P}/models/base": "db"},
    "arm_results": [
        {
            "arm_id": "zero",
            "scores": [
                {"score": name, **ESTIMATE}
                for name in (
                    "exact_match",
                    "field_match.fields",
                    "field_match.record",
                    "field_match.parsed",
                    "field_match.field.colour",
                    "perplexity",
                    "bleu",
                )
            ],
            "num_generated_tokens": 1,
            "num_prompt_tokens": 2,
            "duration_seconds": 0.5,
            "num_cut": 3,
        }
    ],
    "comparisons": [
        {
            "candidate_arm_id": "tuned",
            "baseline_arm_id": "zero",
            "score": "perplexity",
            **DIFFERENCE,
            "p_value": None,
            "verdict": "WORSE",
        }
    ],
    "num_records": 2,
    "progress": None,
    "failure": None,
    "end_time": "2026-01-02T03:04:05.678901+00:00",
}
# What is stored by the version before this one.
LATEST: dict[str, Any] = {
    "dataset_version": f"{P}/datasets/d/versions/v",
    "arms": [
        {
            "arm_id": "own",
            "model": f"{P}/models/base",
            "num_shots": 3,
            "chat_template": "mine",
            "template": "UNSPECIFIED",
        },
        {
            "arm_id": "tuned",
            "model": f"{P}/models/tuned",
            "num_shots": 0,
            "chat_template": "",
            "template": "TAUGHT",
        },
    ],
    "display_name": "Näme",
    "split": "VALIDATION",
    "max_records": 9,
    "seed": -4,
    "metrics": ["FIELD_MATCH", "PERPLEXITY"],
    "max_new_tokens": 33,
    "base_model": f"{P}/models/base",
    "dataset_digest": "dv",
    "model_digests": {f"{P}/models/base": "db", f"{P}/models/tuned": "dt"},
    "askings": {
        "tuned": {
            "source": "TAUGHT",
            "chat_template": "t",
            "template_date": "2026-01-01",
            "prefix_token_ids": [],
            "stop_token_ids": [5],
        },
        "own": {
            "source": "ARM",
            "chat_template": "mine",
            "template_date": "2026-02-02",
            "prefix_token_ids": None,
            "stop_token_ids": [],
            "eos_token_ids": [9, 11],
            "old_prefix": True,
        },
    },
    "arm_results": [
        {
            "arm_id": "own",
            "scores": [
                {
                    "score": "exact_match",
                    **ESTIMATE,
                    "kind": "BINARY",
                    "higher_is_better": True,
                    "text_form": "NFC",
                },
                {
                    "score": "perplexity",
                    **ESTIMATE,
                    "kind": "REAL",
                    "higher_is_better": False,
                    "text_form": None,
                },
            ],
            "num_generated_tokens": 100,
            "num_prompt_tokens": 200,
            "duration_seconds": 1.5,
            "num_cut": 2,
            "template_source": "ARM",
            "template_digest": "e",
            "template_date": "2026-02-02",
            "num_errors": 1,
        }
    ],
    "comparisons": [
        {
            "candidate_arm_id": "tuned",
            "baseline_arm_id": "own",
            "score": "exact_match",
            **DIFFERENCE,
            "p_value": 0.0,
            "verdict": "BETTER",
            "kind": "BINARY",
            "higher_is_better": True,
        }
    ],
    "num_records": 9,
    "progress": None,
    "failure": None,
    "end_time": "2026-01-02T03:04:05+00:00",
    "predictions": {"sha256": "f" * 64, "size_bytes": 77, "num_rows": 9},
    "warnings": ["arm own could not answer 1 of 9 records"],
}
FAILURE = {
    "code": "INVALID_ARGUMENT",
    "reason": "INVALID_RECORDS",
    "message": "row 3: no JSON",
    "metadata": {"row": "3"},
    "retry_after_seconds": None,
}
PROGRESS = {
    "phase": "arm own, 1 of 2",
    "completed": 8,
    "total": 18,
    "unit": "answers",
    "remaining_seconds": 2.5,
}
