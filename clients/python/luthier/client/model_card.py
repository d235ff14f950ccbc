"""The model card that a download carries: what a model was made from, what it learnt, and how it was found to be.

It is written where a model is downloaded, and not kept with it: scores come after weights, and are another service's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TypeVar

from luthier.client.drift import divergence_words, retained_words, text_loss_words
from luthier.client.escaping import escaped
from luthier.client.flows import Flow, Scope, call, pages
from luthier.client.names import project, short
from luthier.client.retry import RetryPolicy
from luthier.client.scores import estimate_words
from luthier.client.verdicts import outcome_word
from luthier.errors import LuthierError
from luthier.v1.base_precision_pb2 import (
    BASE_PRECISION_BFLOAT16,
    BASE_PRECISION_UNSPECIFIED,
    BasePrecision,
)
from luthier.v1.data_service_pb2 import GetRenderingRequest
from luthier.v1.dataset_pb2 import Split
from luthier.v1.evaluation_pb2 import ArmResult, Evaluation, ScoreEstimate
from luthier.v1.evaluation_service_pb2 import ListEvaluationsRequest
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob
from luthier.v1.model_pb2 import ExportFormat, Model
from luthier.v1.reference_pb2 import Reference
from luthier.v1.rendering_pb2 import Rendering
from luthier.v1.training_service_pb2 import GetFineTuningJobRequest

CARD = "README.md"
"""Where a download has it."""
_ONCE = RetryPolicy(deadline_seconds=0.0)
_KINDS = {
    Model.KIND_ADAPTER: "A LoRA adapter in PEFT's layout",
    Model.KIND_WEIGHTS: "All weights of a model in transformers' layout",
    Model.KIND_REWARD: "A reward model: it values answers",
    Model.KIND_EXPORT: "A file for other programs",
}
T = TypeVar("T")
R = TypeVar("R", FineTuningJob, Rendering)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a card tells of.

    Attributes:
        model: the one that is downloaded.
        job: that tuned it; None: there is none, or it is not there any more.
        renderings: that the job learnt from, those that are still there.
        evaluations: in which it, or what it was made from, was asked.
        missing: what could not be asked, and why.
    """

    model: Model
    job: FineTuningJob | None
    renderings: Sequence[Rendering]
    evaluations: Sequence[Evaluation]
    missing: Sequence[str] = ()


def has_card(model: Model) -> bool:
    """Whether there is something to tell of a model: of a base model its own publisher does."""
    return model.kind in _KINDS


async def find(scope: Scope, model: Model) -> Found:
    """Ask the services for what a card tells of; what is not there any more, or away, is missing from it and named."""
    once, missing = replace(scope, retry=_ONCE), list[str]()

    async def asked(what: str, flow: Flow[T]) -> T | None:
        try:
            return await flow
        except LuthierError as error:
            missing.append(f"{what}: {error.message}")
            return None

    job: FineTuningJob | None = None
    if model.fine_tuning_job:
        request = GetFineTuningJobRequest(name=model.fine_tuning_job)
        flow = call(once, lambda stubs: stubs.training.GetFineTuningJob, request)
        job = _same(model.references, await asked(model.fine_tuning_job, flow), missing)
    renderings = []
    learnt = job or FineTuningJob()
    for name in filter(None, (learnt.rendering, *(one.rendering for one in learnt.mixed_renderings))):
        found = await asked(
            name, call(once, lambda stubs: stubs.data.GetRendering, GetRenderingRequest(name=name))
        )
        kept = _same(learnt.references, found, missing)
        renderings += [] if kept is None else [kept]
    evaluations = await asked("evaluations", _evaluations(once, model))
    return Found(model=model, job=job, renderings=renderings, evaluations=evaluations or (), missing=missing)


def _same(references: Iterable[Reference], found: R | None, missing: list[str]) -> R | None:
    """Return a resource if it is the one that another was made from; one that only has its name is missing."""
    uids = {one.uid for one in references if found is not None and one.name == found.name} - {""}
    if found is None or not uids or found.uid in uids:
        return found
    missing.append(f"{found.name}: the name means another one by now")
    return None


async def _evaluations(scope: Scope, model: Model) -> list[Evaluation]:
    uids = {model.uid, *(one.uid for one in model.references if one.name == model.start_from)}
    request = ListEvaluationsRequest(parent=project(scope.project), filter='state = "SUCCEEDED"')
    listing = pages(
        scope, lambda stubs: stubs.evaluation.ListEvaluations, request, lambda page: page.evaluations
    )
    return [one async for one in listing if uids & _asked(one).keys()]


def _asked(evaluation: Evaluation) -> dict[str, str]:
    """Return the names of the models that an evaluation asked, by uid."""
    models = {arm.model for arm in evaluation.arms}
    return {one.uid: one.name for one in evaluation.references if one.name in models and one.uid}


def written(found: Found) -> str:
    """Return the card in Markdown."""
    model = found.model
    sections = [
        f"# {_text(model.display_name or short(model.name))}",
        _what(model),
        "## Where it is from\n\n" + _table("what", "uid", "digest", rows=_lineage(model)),
        _data(found),
        _training(found),
        _compared(model),
        _held_out(found),
        _verdicts(found),
        _scores(found),
        _drift(found),
        "\n".join(f"- could not be asked when this was written: {_text(one)}" for one in found.missing),
        "Made with Luthier.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _what(model: Model) -> str:
    told = [_KINDS.get(model.kind, "A model")]
    if model.kind == Model.KIND_EXPORT:
        told.append(f"({ExportFormat.Name(model.export_format).removeprefix('EXPORT_FORMAT_')})")
    if model.base_model:
        told.append(f"on `{short(model.base_model)}`")
    if model.architecture:
        told.append(f"of architecture {model.architecture}")
    if model.context_length:
        told.append(f"with a context of {model.context_length:,} tokens")
    if model.taught.chat_template:
        told.append("taught chats by the template that it comes with")
    if model.base_precision not in (BASE_PRECISION_UNSPECIFIED, BASE_PRECISION_BFLOAT16):
        told.append(
            f"that was held in {_precision(model.base_precision)} while it was trained: beside other numbers it was "
            "never measured"
        )
    warnings = "".join(f"\n\n**{_text(one)}**" for one in model.warnings)
    return f"{' '.join(told)}.{warnings}"


def _lineage(model: Model) -> Iterable[Sequence[str]]:
    yield f"this model, `{short(model.name)}`, step {model.step}", model.uid, model.digest
    for one in model.references:
        part = one.name.split("/")[-2].rstrip("s") if "/" in one.name else ""
        yield f"{part} `{short(one.name)}`", one.uid, one.digest


def _data(found: Found) -> str:
    rows = [
        (
            f"`{short(rendering.name)}` of `{short(rendering.dataset_version)}`",
            Split.Name(one.split).removeprefix("SPLIT_").lower(),
            f"{one.num_records or one.tokens.count:,}",
            f"{one.tokens.sum:,}",
            f"{one.supervised_tokens.sum:,}",
        )
        for rendering in found.renderings
        for one in rendering.split_statistics
    ]
    return (
        "## Data\n\n" + _table("rendering", "split", "records", "tokens", "learnt", rows=rows) if rows else ""
    )


def _training(found: Found) -> str:
    job = found.job
    if job is None:
        return ""
    chosen = job.hyperparameters
    facts = [
        ("method", job.WhichOneof("method") or "supervised"),
        *_adaptation(job),
        ("learning rate", f"{chosen.learning_rate:g}"),
        ("seed", str(chosen.seed)),
        ("software", f"Luthier {job.run_record.code_version}, torch {job.run_record.torch_version}"),
        ("device", job.run_record.device),
        *(
            (name, f"{job.latest_metrics[name]:.4g}")
            for name in sorted(job.latest_metrics)
            if name.endswith("loss")
        ),
    ]
    return "## Training\n\n" + _table("setting", "value", rows=[one for one in facts if one[1]])


def _adaptation(job: FineTuningJob) -> Iterable[tuple[str, str]]:
    if not job.HasField("lora"):
        yield "adaptation", "full"
        return
    lora = job.lora
    kind = f"{'rs' * lora.use_rslora}{'dora' if lora.use_dora else 'lora'}"
    yield "adaptation", f"{kind}, rank {lora.rank}"
    yield "alpha", f"{lora.alpha:g}" if lora.HasField("alpha") else ""
    yield "LoRA+ ratio", f"{lora.lora_plus_ratio:g}" if lora.lora_plus_ratio else ""
    yield "base held in", _precision(job.base_precision) if job.base_precision else ""


def _precision(chosen: BasePrecision.ValueType) -> str:
    return BasePrecision.Name(chosen).removeprefix("BASE_PRECISION_")


def _compared(model: Model) -> str:
    if not model.HasField("check"):
        return ""
    check = model.check
    learnt = f" What was learnt moves them by {check.effect:.2g}." if check.effect else ""
    if check.base_difference:
        learnt += (
            f" It is made on the numbers that its base has in {_precision(check.base_precision)}, beside which it was "
            f"trained; they move the base's own by {check.base_difference:.2g}."
        )
    return (
        f"## Compared with what it was made from\n\nAt {check.num_positions} positions its logits differ from those of "
        f"`{short(model.start_from)}` by {check.difference:.2g} of their spread (at most {check.bound:g} is allowed)."
        f"{learnt} Of {check.num_greedy_tokens} tokens of greedy answers {check.num_equal_greedy_tokens} are the same."
    )


def _held_out(found: Found) -> str:
    """What each engine finds of the same held-out tokens."""
    if found.job is None or not found.job.run_record.HasField("held_out"):
        return ""
    kept = found.job.run_record.held_out
    trained = [value for row in kept.rows for value in row.trainer_logprobs]
    sampled = [value for row in kept.rows for value in row.sampler_logprobs]
    rows = [
        (f"training, step {kept.step}", f"{fmean(trained):.4f}", ""),
        (f"generation, step {kept.step}", f"{fmean(sampled):.4f}", f"{kept.mean_difference:.2g}"),
    ]
    check = found.model.check
    if check.held_out_logprobs:
        rows.append(
            ("this model", f"{fmean(check.held_out_logprobs):.4f}", f"{check.held_out_difference:.2g}")
        )
    heads = ("computed by", "mean log-probability", "mean difference to training")
    return f"## The same {len(trained)} held-out tokens by each engine\n\n" + _table(*heads, rows=rows)


def _verdicts(found: Found) -> str:
    """What each evaluation says in a sentence, and how many of its records the models had learnt from."""
    rows = [
        (f"`{short(one.name)}`", outcome_word(one.verdict), one.verdict.sentence, _contamination(one))
        for one in found.evaluations
        if one.verdict.sentence or one.HasField("contamination")
    ]
    heads = ("evaluation", "verdict", "in a sentence", "records that were learnt from")
    return "## Verdicts\n\n" + _table(*heads, rows=rows) if rows else ""


def _contamination(evaluation: Evaluation) -> str:
    if not evaluation.HasField("contamination"):
        return ""
    found = evaluation.contamination
    count = found.num_exact + found.num_normalised + found.num_ngram
    told = f"{count:,} of {evaluation.num_records:,}"
    if found.unknown_models:
        told += f"; not known of {', '.join(map(short, found.unknown_models))}"
    return told


def _scores(found: Found) -> str:
    rows = [
        (
            f"`{short(evaluation.name)}`",
            f"{arm.arm_id} (`{short(arm.model)}`)",
            score.score,
            estimate_words(score),
            _answered(score, result),
        )
        for evaluation in found.evaluations
        for arm in evaluation.arms
        for result in evaluation.arm_results
        if result.arm_id == arm.arm_id
        for score in result.scores
    ]
    if not rows:
        return ""
    heads = ("evaluation", "arm", "score", "value [95 % interval]", "records")
    return "## Scores\n\n" + _table(*heads, rows=rows)


def _answered(score: ScoreEstimate, result: ArmResult) -> str:
    """Return the records that a score is of, beside those that the arm could not answer."""
    return f"{score.count:,}" + (f", {result.num_errors:,} more not answered" if result.num_errors else "")


def _drift(found: Found) -> str:
    """What the model, or what it was made from, retains of what others could do before."""
    rows = [
        (
            f"`{short(evaluation.name)}`",
            f"{one.arm_id} (`{short(arm.model)}`), from {one.baseline_arm_id}",
            retained_words(one),
            divergence_words(one),
            text_loss_words(one),
        )
        for evaluation in found.evaluations
        for arm in evaluation.arms
        for one in evaluation.drift_results
        if one.arm_id == arm.arm_id
    ]
    if not rows:
        return ""
    heads = ("evaluation", "arm", "retained of general abilities", "divergence", "general text")
    return "## What was forgotten\n\n" + _table(*heads, rows=rows)


def _table(*heads: str, rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(_text(cell) for cell in line)} |" for line in lines)


def _text(text: str) -> str:
    """Return a text of a caller as one cell of a table takes it."""
    return escaped(text).replace("|", "\\|").replace("\n", " ")
