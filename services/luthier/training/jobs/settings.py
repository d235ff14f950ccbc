"""What a caller asks of a job, its defaults and its limits. All wrong fields are named at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from luthier.errors import FieldViolation, InvalidArgument
from luthier.runtime import names
from luthier.runtime.labels import display_name_violations, label_violations
from luthier.training.jobs.domain import Hyperparameters, LearningRateSchedule, LoraSettings

MAX_RANK = 512
# Far beyond any use; what float32 cannot hold would stop the worker instead of the caller.
MAX_ALPHA = 1e6
MAX_LEARNING_RATE = 1000.0
MAX_WEIGHT_DECAY = 1000.0
MAX_GRAD_NORM = 1e9
MAX_EPOCHS = 10_000
MAX_STEPS = 10_000_000
MAX_BATCH_TOKENS = 1 << 24
MAX_BATCH_ROWS = 1 << 16
MAX_TARGETS = 256
DEFAULT_RANK = 16
DEFAULT_BATCH_TOKENS = 4096
DEFAULT_MICRO_BATCH_TOKENS = 4096
DEFAULT_LEARNING_RATE = 2e-4
DEFAULT_MAX_GRAD_NORM = 1.0
DEFAULT_CHECKPOINT_INTERVAL = 25
DEFAULT_MAX_CHECKPOINTS = 3
MAX_CHECKPOINTS = 10_000
_ROOT = "fine_tuning_job"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraRequest:
    """An adapter as asked for; None means not said."""

    rank: int | None = None
    alpha: float | None = None
    target_modules: tuple[str, ...] = ()
    use_rslora: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class HyperparametersRequest:
    """Hyperparameters as asked for; None, and 0 where the API says so, mean not said."""

    num_epochs: int = 0
    max_steps: int = 0
    batch_tokens: int | None = None
    batch_rows: int | None = None
    micro_batch_tokens: int = 0
    learning_rate: float | None = None
    warmup_steps: int = 0
    learning_rate_schedule: LearningRateSchedule | None = None
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRequest:
    """A job as asked for."""

    base_model: str
    rendering: str
    display_name: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    lora: LoraRequest = field(default_factory=LoraRequest)
    hyperparameters: HyperparametersRequest = field(default_factory=HyperparametersRequest)
    checkpoint_interval_steps: int = 0
    validation_interval_steps: int = 0
    max_checkpoints: int = 0
    tuned_model_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSettings:
    """A job's settings with every default filled in."""

    lora: LoraSettings
    hyperparameters: Hyperparameters
    checkpoint_interval_steps: int
    validation_interval_steps: int
    max_checkpoints: int


class _Violations:
    """Collects what is wrong, so that a caller hears of all of it in one answer."""

    def __init__(self) -> None:
        self.found: list[FieldViolation] = []

    def add(self, path: str, rule: str, value: object) -> None:
        self.found.append(
            FieldViolation(field=f"{_ROOT}.{path}", description=f"{path} must be {rule}, got {value!r}")
        )

    def whole(self, path: str, value: int, least: int, most: int) -> None:
        if not least <= value <= most:
            self.add(path, f"in {least}..{most}", value)

    def positive(self, path: str, value: float, most: float) -> None:
        if not 0 < value <= most:
            self.add(path, f"above 0 and at most {most:g}", value)

    def not_negative(self, path: str, value: float, most: float) -> None:
        if not 0 <= value <= most:
            self.add(path, f"in 0..{most:g}", value)

    def check(self) -> None:
        if self.found:
            raise wrong_fields(*self.found)


def wrong_fields(*violations: FieldViolation) -> InvalidArgument:
    """Return the error for wrong fields; its message is their descriptions, which name the fields."""
    return InvalidArgument(
        "; ".join(violation.description for violation in violations),
        reason=violations[0].reason,
        violations=violations,
    )


def resolve(request: JobRequest) -> JobSettings:
    """Fill in all defaults.

    Raises:
        InvalidArgument: names every field that is wrong, with its value and what would be right.
    """
    violations = _Violations()
    _check_texts(request, violations)
    settings = JobSettings(
        lora=_resolve_lora(request.lora),
        hyperparameters=_resolve_hyperparameters(request.hyperparameters),
        checkpoint_interval_steps=request.checkpoint_interval_steps or DEFAULT_CHECKPOINT_INTERVAL,
        validation_interval_steps=request.validation_interval_steps,
        max_checkpoints=request.max_checkpoints or DEFAULT_MAX_CHECKPOINTS,
    )
    _check_lora(settings.lora, violations)
    _check_hyperparameters(settings.hyperparameters, violations)
    if request.hyperparameters.batch_rows is not None:
        violations.whole("hyperparameters.batch_rows", settings.hyperparameters.batch_rows, 1, MAX_BATCH_ROWS)
    else:
        violations.whole(
            "hyperparameters.batch_tokens", settings.hyperparameters.batch_tokens, 1, MAX_BATCH_TOKENS
        )
    violations.whole("checkpoint_interval_steps", settings.checkpoint_interval_steps, 1, MAX_STEPS)
    violations.whole("max_checkpoints", settings.max_checkpoints, 1, MAX_CHECKPOINTS)
    violations.whole("validation_interval_steps", settings.validation_interval_steps, 0, MAX_STEPS)
    violations.check()
    return settings


def _resolve_lora(asked: LoraRequest) -> LoraSettings:
    rank = DEFAULT_RANK if asked.rank is None else asked.rank
    return LoraSettings(
        rank=rank,
        alpha=2.0 * rank if asked.alpha is None else asked.alpha,
        target_modules=asked.target_modules,
        use_rslora=asked.use_rslora,
    )


def _resolve_hyperparameters(asked: HyperparametersRequest) -> Hyperparameters:
    batch_tokens = asked.batch_tokens or 0
    if asked.batch_tokens is None and asked.batch_rows is None:
        batch_tokens = DEFAULT_BATCH_TOKENS
    return Hyperparameters(
        num_epochs=asked.num_epochs or 1,
        max_steps=asked.max_steps,
        batch_tokens=batch_tokens,
        batch_rows=asked.batch_rows or 0,
        micro_batch_tokens=asked.micro_batch_tokens or DEFAULT_MICRO_BATCH_TOKENS,
        learning_rate=DEFAULT_LEARNING_RATE if asked.learning_rate is None else asked.learning_rate,
        warmup_steps=asked.warmup_steps,
        learning_rate_schedule=asked.learning_rate_schedule or LearningRateSchedule.COSINE,
        weight_decay=asked.weight_decay,
        max_grad_norm=DEFAULT_MAX_GRAD_NORM if asked.max_grad_norm is None else asked.max_grad_norm,
        seed=asked.seed,
    )


def _check_texts(request: JobRequest, violations: _Violations) -> None:
    violations.found += display_name_violations(request.display_name, f"{_ROOT}.display_name")
    violations.found += label_violations(request.labels, f"{_ROOT}.labels")
    if request.tuned_model_id:
        try:
            names.check_id(request.tuned_model_id, field="tuned_model_id")
        except InvalidArgument:
            violations.add("tuned_model_id", names.ID_RULE, request.tuned_model_id)
    if len(request.lora.target_modules) > MAX_TARGETS:
        violations.add(
            "lora.target_modules", f"at most {MAX_TARGETS} names", len(request.lora.target_modules)
        )
    if not all(request.lora.target_modules):
        violations.add("lora.target_modules", "names of modules", "")


def _check_lora(lora: LoraSettings, violations: _Violations) -> None:
    violations.whole("lora.rank", lora.rank, 1, MAX_RANK)
    if 1 <= lora.rank <= MAX_RANK:  # otherwise alpha may just follow from the wrong rank
        violations.positive("lora.alpha", lora.alpha, MAX_ALPHA)


def _check_hyperparameters(chosen: Hyperparameters, violations: _Violations) -> None:
    violations.whole("hyperparameters.num_epochs", chosen.num_epochs, 1, MAX_EPOCHS)
    violations.whole("hyperparameters.max_steps", chosen.max_steps, 0, MAX_STEPS)
    violations.whole("hyperparameters.micro_batch_tokens", chosen.micro_batch_tokens, 1, MAX_BATCH_TOKENS)
    violations.positive("hyperparameters.learning_rate", chosen.learning_rate, MAX_LEARNING_RATE)
    violations.whole("hyperparameters.warmup_steps", chosen.warmup_steps, 0, MAX_STEPS)
    violations.not_negative("hyperparameters.weight_decay", chosen.weight_decay, MAX_WEIGHT_DECAY)
    violations.not_negative("hyperparameters.max_grad_norm", chosen.max_grad_norm, MAX_GRAD_NORM)
