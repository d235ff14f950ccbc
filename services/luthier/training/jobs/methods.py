"""How jobs are trained: what each method takes, its defaults, and which rendering it learns from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from luthier.errors import FieldViolation
from luthier.runtime.field_limits import (
    SHARE,
    Limit,
    LimitTable,
    fill_defaults,
    not_negative,
    positive,
    whole,
)
from luthier.training.jobs.reinforcement import LIMITS as REINFORCEMENT_LIMITS
from luthier.training.jobs.reinforcement import fill_reinforcement, reinforcement_violations
from luthier.v1.fine_tuning_job_pb2 import (
    LEARNING_RATE_SCHEDULE_WARMUP_STABLE_DECAY,
    FineTuningJob,
    PreferenceConfig,
    Selection,
)
from luthier.v1.rendering_pb2 import (
    RENDERING_KIND_PREFERENCE,
    RENDERING_KIND_PROMPT,
    RENDERING_KIND_SUPERVISED,
    RENDERING_KIND_UNPAIRED,
    RenderingKind,
)

_ROOT = "fine_tuning_job"
_MOST = 1e6
Loss = PreferenceConfig.Loss

LIMITS: LimitTable = {
    "hyperparameters.warmup_ratio": SHARE,
    "hyperparameters.decay_steps": whole(0, 10_000_000),
    "hyperparameters.decay_ratio": positive(1.0),
    "preference.beta": positive(_MOST),
    "preference.label_smoothing": Limit(rule="must be in [0, 0.5)", allows=lambda value: 0 <= value < 0.5),
    "preference.nll_weight": not_negative(_MOST),
    "preference.gamma": not_negative(_MOST),
    "preference.desirable_weight": positive(_MOST),
    "preference.undesirable_weight": positive(_MOST),
    "reward_model.margin": not_negative(_MOST),
    "reward_model.centring": not_negative(_MOST),
    **REINFORCEMENT_LIMITS,
    "selection.min_delta": not_negative(1e9),
    "selection.patience": whole(0, 10_000_000),
}
LEARNING_RATES: Mapping[str, tuple[float, float]] = {
    "supervised": (2e-4, 2e-5),
    "preference": (2e-5, 1e-6),
    "reward_model": (1e-4, 1e-5),
    # TRL's default for all weights; an adapter takes some ten times that of all weights in reinforcement too
    # (thinkingmachines.ai/blog/lora).
    "reinforcement": (1e-5, 1e-6),
}
"""Peaks by method: of an adapter, and of all weights, which move at once."""

_LOSS_DEFAULTS: Mapping[Loss.ValueType, Mapping[str, float]] = {
    Loss.LOSS_DPO: {"beta": 0.1},
    Loss.LOSS_IPO: {"beta": 0.1},
    Loss.LOSS_ORPO: {"beta": 0.1},
    Loss.LOSS_SIMPO: {"beta": 2.0, "gamma": 1.0},
    Loss.LOSS_KTO: {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
}
_OPTIONS: Mapping[Loss.ValueType, frozenset[str]] = {
    Loss.LOSS_DPO: frozenset({"beta", "label_smoothing", "nll_weight"}),
    Loss.LOSS_IPO: frozenset({"beta", "nll_weight"}),
    Loss.LOSS_ORPO: frozenset({"beta"}),
    Loss.LOSS_SIMPO: frozenset({"beta", "gamma"}),
    Loss.LOSS_KTO: frozenset({"beta", "desirable_weight", "undesirable_weight"}),
}
"""Fields of a preference job that mean something to a loss."""
_REWARDS = ("reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy")
_METRICS: Mapping[str, frozenset[str]] = {
    "supervised": frozenset({"loss", "token_accuracy"}),
    "preference": frozenset({"loss", *_REWARDS, "logprob_chosen", "logprob_rejected", "nll_loss"}),
    "kto": frozenset({"loss", *_REWARDS, "kl"}),
    "reward_model": frozenset({"loss", *_REWARDS}),
    "reinforcement": frozenset({"reward", "answer_tokens", "truncated_share"}),
}
"""What validations measure, without the prefix."""
_PREFIX = "validation_"
_HIGHER = frozenset(
    {"token_accuracy", "reward", "reward_accuracy", "reward_margin", "reward_chosen", "logprob_chosen"}
)


def method_of(job: FineTuningJob) -> str:
    """Return the name of a job's method."""
    return job.WhichOneof("method") or "supervised"


def described(job: FineTuningJob) -> str:
    """Return a job's method as people call it, that of a preference job with its loss."""
    if not job.HasField("preference"):
        return method_of(job)
    loss = Loss.Name(job.preference.loss or Loss.LOSS_DPO).removeprefix("LOSS_")
    return f"preference ({loss})"


def main_metric(job: FineTuningJob) -> str:
    """Return the metric of validations that tells most of a job's method."""
    return _PREFIX + ("reward" if job.HasField("reinforcement") else "loss")


def judged_by(job: FineTuningJob) -> tuple[str, int]:
    """Return what a job is judged by, and the number of the rendering on which that is measured: 0 is its own."""
    name, _, number = job.selection.metric.rpartition("_")
    return (name, int(number)) if number.isdecimal() else (job.selection.metric, 0)


def rendering_kind(job: FineTuningJob) -> RenderingKind.ValueType:
    """Return the kind of rendering that a job learns from."""
    if method_of(job) == "supervised":
        return RENDERING_KIND_SUPERVISED
    if job.HasField("reinforcement"):
        return RENDERING_KIND_PROMPT
    return RENDERING_KIND_UNPAIRED if _is_kto(job) else RENDERING_KIND_PREFERENCE


def fill_method(job: FineTuningJob) -> None:
    """Fill in, in place, what a job's method and its selection leave unsaid."""
    adapter, full = LEARNING_RATES[method_of(job)]
    fill_defaults(job, {"hyperparameters.learning_rate": full if job.HasField("full") else adapter})
    if job.HasField("preference"):
        chosen = job.preference
        chosen.loss = chosen.loss or Loss.LOSS_DPO
        fill_defaults(chosen, _LOSS_DEFAULTS[chosen.loss])
    if job.HasField("reward_model"):
        fill_defaults(job.reward_model, {"centring": 0.01})
    if job.HasField("reinforcement"):
        fill_reinforcement(job)
    if job.HasField("selection"):
        chosen_metric = job.selection
        fill_defaults(chosen_metric, {"metric": main_metric(job)})
        higher = judged_by(job)[0].removeprefix(_PREFIX) in _HIGHER
        better = Selection.DIRECTION_HIGHER if higher else Selection.DIRECTION_LOWER
        fill_defaults(chosen_metric, {"direction": better})
    steers = job.hyperparameters
    if steers.learning_rate_schedule == LEARNING_RATE_SCHEDULE_WARMUP_STABLE_DECAY and not steers.decay_steps:
        fill_defaults(steers, {"decay_ratio": 0.1})


def method_violations(job: FineTuningJob) -> Iterator[FieldViolation]:
    """Yield what does not go together in a new job, as it came."""
    if job.HasField("preference"):
        loss = job.preference.loss or Loss.LOSS_DPO
        for field, _ in job.preference.ListFields():
            if field.name not in {"loss", *_OPTIONS[loss]}:
                name = Loss.Name(loss).removeprefix("LOSS_")
                takers = [
                    Loss.Name(one).removeprefix("LOSS_")
                    for one, options in _OPTIONS.items()
                    if field.name in options
                ]
                yield _violation(
                    f"preference.{field.name}",
                    f"must be unset with loss {name}: it belongs to {' and '.join(takers)}",
                )
    if job.HasField("reinforcement"):
        yield from reinforcement_violations(job)
    if job.HasField("selection") and job.selection.metric:
        yield from _metric_violations(job)
    yield from _schedule_violations(job)


def _metric_violations(job: FineTuningJob) -> Iterator[FieldViolation]:
    known = sorted(_PREFIX + name for name in _METRICS["kto" if _is_kto(job) else method_of(job)])
    suffixes = ["", *(f"_{number}" for number in range(1, len(job.mixed_renderings) + 1))]
    if job.selection.metric not in {name + suffix for name in known for suffix in suffixes}:
        numbered = (
            f", with {' or '.join(suffixes[1:])} behind it for a mixed rendering" if suffixes[1:] else ""
        )
        yield _violation(
            "selection.metric", f"must be one of {', '.join(known)}{numbered}, got {job.selection.metric!r}"
        )


def _schedule_violations(job: FineTuningJob) -> Iterator[FieldViolation]:
    steers = job.hyperparameters
    if steers.warmup_ratio and steers.warmup_steps:
        yield _violation("hyperparameters.warmup_ratio", "must be unset beside warmup_steps")
    decays = steers.learning_rate_schedule == LEARNING_RATE_SCHEDULE_WARMUP_STABLE_DECAY
    for name, said in (("decay_steps", steers.decay_steps), ("decay_ratio", steers.HasField("decay_ratio"))):
        if said and not decays:
            yield _violation(
                f"hyperparameters.{name}", "must be unset without learning_rate_schedule WARMUP_STABLE_DECAY"
            )
    if decays and steers.decay_steps and steers.HasField("decay_ratio"):
        yield _violation("hyperparameters.decay_ratio", "must be unset beside decay_steps")


def _is_kto(job: FineTuningJob) -> bool:
    return job.HasField("preference") and job.preference.loss == Loss.LOSS_KTO


def _violation(field: str, description: str) -> FieldViolation:
    return FieldViolation(field=f"{_ROOT}.{field}", description=description)
