"""Jobs that mix renderings by share: what shares may be, whose rows meet, and what to know of them before training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from luthier.errors import FieldViolation, Reason
from luthier.runtime.field_limits import Limit, LimitTable, count, demanded, required
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob, RenderingUse
from luthier.v1.rendering_pb2 import Rendering

MAX_MIXED = 8
_ROOT = "fine_tuning_job"
_ROUNDING = 1e-6
"""Of shares that people write down, thirds among them, what their sum may differ from 1."""
_FAR_OFF = 0.1
"""What a share may differ from what was asked, as a part of that, and nobody needs to know."""
_PART = Limit(rule="must be above 0 and below 1", allows=lambda value: 0 < value < 1)

LIMITS: LimitTable = {
    "mixed_renderings": count(MAX_MIXED, "renderings"),
    "mixed_renderings[].rendering": required("must name a rendering"),
    "mixed_renderings[].share": demanded(_PART),
    "rendering_share": _PART,
}


def mixture_violations(job: FineTuningJob) -> Iterator[FieldViolation]:
    """Yield what does not go together in the renderings of a new job, as it came."""
    if not job.mixed_renderings:
        if job.rendering_share:
            yield _violation(
                "rendering_share",
                "must be unset without mixed_renderings: the rendering is all that is learnt",
            )
        return
    if job.HasField("reinforcement"):
        yield _violation(
            "mixed_renderings", "must be unset with reinforcement, whose prompts are of one rendering"
        )
    seen = {job.rendering}
    for number, mixed in enumerate(job.mixed_renderings):
        if mixed.rendering in seen:
            which = "the job's own" if mixed.rendering == job.rendering else "mixed in already"
            yield _violation(
                f"mixed_renderings[{number}].rendering",
                f"must be another rendering, {mixed.rendering} is {which}",
            )
        seen.add(mixed.rendering)
    yield from _sum_violations(job)


def _sum_violations(job: FineTuningJob) -> Iterator[FieldViolation]:
    shares = [mixed.share for mixed in job.mixed_renderings]
    mixed_sum = sum(shares)
    if job.rendering_share:
        whole = mixed_sum + job.rendering_share
        if abs(whole - 1) > _ROUNDING:
            yield _violation(
                "mixed_renderings",
                f"shares must add up to 1, rendering_share with them, got {whole:g} "
                f"({_added([job.rendering_share, *shares])})",
                Reason.SHARES_DO_NOT_ADD_UP,
            )
    elif mixed_sum >= 1 - _ROUNDING:
        yield _violation(
            "mixed_renderings",
            f"shares must add up to less than 1, as the rest is that of the job's own rendering, got {mixed_sum:g} "
            f"({_added(shares)})",
            Reason.SHARES_DO_NOT_ADD_UP,
        )


def fill_shares(job: FineTuningJob) -> None:
    """Fill in, in place, the share that is left for a job's own rendering."""
    if job.mixed_renderings and not job.rendering_share:
        job.rendering_share = 1 - sum(mixed.share for mixed in job.mixed_renderings)


def mixture_warnings(renderings: Sequence[Rendering], used: Sequence[RenderingUse]) -> Iterator[str]:
    """Yield what a user would want to know of renderings that are mixed, the job's own first, and of their use."""
    own, epochs = renderings[0], used[0].num_epochs
    for rendering, use in zip(renderings, used, strict=True):
        # A few steps may take nothing of the job's own, which is told of as a share that is not reached.
        repeated = use.num_epochs / epochs if epochs else 0.0
        if rendering is not own and use.num_epochs > 1 and repeated > 1:
            yield (
                f"rows of {use.rendering} are seen {repeated:.3g} times an epoch, as its share of {use.share:g} asks "
                "for more than it has; a smaller share or more rows of it repeat less"
            )
        if abs(use.reached_share - use.share) > _FAR_OFF * use.share:
            yield (
                f"the share of {use.rendering} comes to {use.reached_share:.3g}, {use.share:.3g} was asked: its rows "
                "are too long, or all steps too few, to come nearer"
            )
        if rendering.effective_chat_template != own.effective_chat_template:
            yield (
                f"{use.rendering} was rendered with another chat template than {own.name}, whose template the tuned "
                "model is asked with; create it anew with the same one unless this is meant"
            )


def _added(shares: Sequence[float]) -> str:
    return " + ".join(f"{share:g}" for share in shares)


def _violation(field: str, description: str, reason: Reason = Reason.INVALID_FIELD) -> FieldViolation:
    return FieldViolation(field=f"{_ROOT}.{field}", description=description, reason=reason)
