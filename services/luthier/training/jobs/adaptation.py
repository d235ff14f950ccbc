"""What a job's adapter may be: limits of its fields, and the patterns of its modules."""

from __future__ import annotations

from collections.abc import Iterator

from luthier.errors import FieldViolation
from luthier.lm.module_patterns import check_pattern
from luthier.runtime.field_limits import SHARE, Limit, LimitTable, count, positive, whole
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob

MAX_TARGETS = 256
MAX_PATTERNS = 64
MAX_RATIO = 1000
TRAINABLE = ("embed_tokens", "lm_head")
_LORA = "fine_tuning_job.lora"
_RANK = whole(1, 512)
_ALPHA = positive(1e6)

LIMITS: LimitTable = {
    "lora.target_modules": count(MAX_TARGETS, "names"),
    "lora.target_modules[]": Limit(rule="must be the name of a module", allows=bool),
    "lora.rank": _RANK,
    "lora.alpha": _ALPHA,
    "lora.dropout": SHARE,
    "lora.lora_plus_ratio": Limit(
        rule="must be 0 or in [1, 1000]", allows=lambda ratio: ratio == 0 or 1 <= ratio <= MAX_RATIO
    ),
    "lora.rank_pattern": count(MAX_PATTERNS, "patterns"),
    "lora.alpha_pattern": count(MAX_PATTERNS, "patterns"),
    "lora.trained_modules[]": Limit(
        rule=f"must be {' or '.join(TRAINABLE)}", allows=lambda name: name in TRAINABLE
    ),
}


def lora_violations(job: FineTuningJob) -> Iterator[FieldViolation]:
    """Yield what is wrong with a new job's adapter, but for what only its worker knows: the names of modules."""
    trained = list(job.lora.trained_modules)
    if len(set(trained)) < len(trained):
        yield FieldViolation(
            field=f"{_LORA}.trained_modules", description=f"must name each module once, got {trained}"
        )
    if job.lora.use_dora and job.lora.dropout:
        yield FieldViolation(
            field=f"{_LORA}.dropout", description=f"must be 0 with use_dora, got {job.lora.dropout:g}"
        )
    if "lm_head" in trained and job.HasField("reward_model"):
        yield FieldViolation(
            field=f"{_LORA}.trained_modules",
            description="must not name lm_head with reward_model: a reward model has no head over words",
        )
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
