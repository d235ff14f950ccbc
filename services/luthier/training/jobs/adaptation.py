"""What a job's adapter may be: limits of its fields, and the patterns of its modules."""

from __future__ import annotations

from collections.abc import Iterator

from luthier.errors import FieldViolation
from luthier.lm.module_patterns import check_pattern
from luthier.runtime.field_limits import SHARE, Limit, LimitTable, count, positive, whole
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob

MAX_TARGETS = 256
MAX_PATTERNS = 64
_LORA = "fine_tuning_job.lora"
_RANK = whole(1, 512)
_ALPHA = positive(1e6)

LIMITS: LimitTable = {
    "lora.target_modules": count(MAX_TARGETS, "names"),
    "lora.target_modules[]": Limit(rule="must be the name of a module", allows=bool),
    "lora.rank": _RANK,
    "lora.alpha": _ALPHA,
    "lora.dropout": SHARE,
    "lora.rank_pattern": count(MAX_PATTERNS, "patterns"),
    "lora.alpha_pattern": count(MAX_PATTERNS, "patterns"),
}


def lora_violations(job: FineTuningJob) -> Iterator[FieldViolation]:
    """Yield what is wrong with the patterns of a new job's adapter; only its worker knows the modules."""
    for name, limit in (("rank_pattern", _RANK), ("alpha_pattern", _ALPHA)):
        for pattern, value in sorted(getattr(job.lora, name).items()):
            field = f"{_LORA}.{name}"
            if not limit.allows(value):
                yield FieldViolation(
                    field=field,
                    description=f"the value of {pattern!r} {limit.rule}, got {limit.shown(value)}",
                )
            try:
                check_pattern(pattern)
            except ValueError as error:
                yield FieldViolation(field=field, description=f"the pattern {pattern!r} {error}")
