"""The HTML report of an evaluation: one file that needs no other, made from protobuf messages alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from luthier.client.askings import asked_with, bases_below, shots_words, system_prompts
from luthier.client.escaping import escaped_html
from luthier.client.names import short
from luthier.client.partial_answers import has_answers
from luthier.client.report_answers import answer_section
from luthier.client.report_charts import interval_chart, loss_curve
from luthier.client.report_curve import curve_section
from luthier.client.report_parts import estimate_cell, facts_table, scrolled, section, table
from luthier.client.report_style import STYLE
from luthier.client.report_verdict import (
    comparison_section,
    drift_section,
    grader_section,
    headline,
    judge_section,
    partial_headline,
)
from luthier.client.scores import (
    estimate_words,
    lower_is_better,
    main_score,
    rows_apart,
    scores_of,
    text_form_words,
)
from luthier.v1.dataset_pb2 import Split
from luthier.v1.evaluation_pb2 import Evaluation, Prediction
from luthier.v1.fine_tuning_job_pb2 import Determinism, FineTuningJob, LearningRateSchedule, MetricPoint
from luthier.v1.model_pb2 import Model

if TYPE_CHECKING:
    from luthier.client import Client


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningRun:
    """A job and its metrics by step."""

    job: FineTuningJob
    metrics: Sequence[MetricPoint] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportData:
    """All that a report shows. `models` by name; `runs` are the jobs that tuned some of them."""

    evaluation: Evaluation
    predictions: Sequence[Prediction] = ()
    models: Mapping[str, Model] = field(default_factory=dict)
    runs: Sequence[TuningRun] = ()


def collect_report(client: Client, evaluation: str) -> ReportData:
    """Fetch what the report of an evaluation shows: answers, models, and the jobs that tuned them."""
    found = client.evaluations.get(evaluation)
    models: dict[str, Model] = {}
    runs: dict[str, TuningRun] = {}
    for name in dict.fromkeys(arm.model for arm in found.arms):
        model = models[name] = client.models.get(name)
        if model.base_model and model.base_model not in models:
            models[model.base_model] = client.models.get(model.base_model)
        if model.fine_tuning_job and model.fine_tuning_job not in runs:
            job = client.jobs.get(model.fine_tuning_job)
            metrics = list(client.jobs.metrics(job.name, page_size=1000))
            runs[job.name] = TuningRun(job=job, metrics=metrics)
    answers = client.evaluations.predictions(found.name, page_size=200) if has_answers(found) else ()
    return ReportData(evaluation=found, predictions=list(answers), models=models, runs=list(runs.values()))


def render_report(data: ReportData) -> str:
    """Return the report as a complete HTML document."""
    evaluation = data.evaluation
    title = evaluation.display_name or short(evaluation.name)
    sections = (
        partial_headline(evaluation, data.predictions),
        headline(evaluation),
        "".join(f'<p class="warning">{escaped_html(warning)}</p>' for warning in evaluation.warnings),
        _results(evaluation),
        drift_section(evaluation),
        _cost(evaluation),
        curve_section(evaluation, {run.job.tuned_model: run.job for run in data.runs}),
        grader_section(evaluation),
        judge_section(evaluation),
        comparison_section(evaluation),
        *(_run(run) for run in data.runs),
        answer_section(evaluation, data.predictions),
        _provenance(evaluation, data.models),
    )
    body = f"{_header(evaluation, title)}\n{''.join(sections)}"
    return _document(f"{title}: evaluation", body, _methods(evaluation))


def render_run(run: TuningRun) -> str:
    """Return a job as a complete HTML document: its curves, what was asked for, and what ran."""
    job = run.job
    title = job.display_name or short(job.name)
    state = FineTuningJob.State.Name(job.state).removeprefix("STATE_")
    said = f"{state}: {job.error.message}" if job.HasField("error") else state
    header = f"<header><h1>{escaped_html(title)}</h1><p>{escaped_html(said)}</p></header>"
    return _document(f"{title}: fine-tuning job", header + _run(run), "")


def _document(title: str, body: str, footer: str) -> str:
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaped_html(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"{body}\n<footer>Made by Luthier. {footer}</footer>\n</main>\n</body>\n</html>\n"
    )


def _methods(evaluation: Evaluation) -> str:
    alone = "Intervals of scores are 95 % intervals: Wilson's where they are right or wrong"
    paired = "Comparisons are paired on the same records"
    if evaluation.comparisons and not any(comparison.method for comparison in evaluation.comparisons):
        return f"{alone}, bootstrap for others. {paired}, with 95 % bootstrap intervals."
    return (
        f"{alone}, of the test that compares them for others. {paired}; interval, p and verdict are of one test. "
        "Where one of several is enough for a verdict they share the error (Bonferroni), those of guards stand as they "
        "are, all others are corrected (Holm) for how many there are: the higher is the confidence of the interval."
    )


def _header(evaluation: Evaluation, title: str) -> str:
    version = short(evaluation.dataset_version)
    split = Split.keys()[evaluation.split].removeprefix("SPLIT_").lower() if evaluation.split else "test"
    ended = (
        evaluation.end_time.ToDatetime().strftime("%Y-%m-%d %H:%M UTC") if evaluation.end_time.seconds else ""
    )
    parts = [
        f"{evaluation.num_records:,} records of {version}, {split} split",
        f"{len(evaluation.arms)} arms",
        ended,
    ]
    line = " · ".join(escaped_html(part) for part in parts if part)
    return f"<header><h1>{escaped_html(title)}</h1><p>{line}</p></header>"


def _results(evaluation: Evaluation) -> str:
    scores = scores_of(evaluation)
    if not scores:
        return ""
    judged = evaluation.verdict.score if evaluation.verdict.score in scores else None
    measured = (entry for result in evaluation.arm_results for entry in result.scores)
    main = judged or main_score(measured) or scores[0]
    estimates = [
        (result.arm_id, estimate)
        for result in evaluation.arm_results
        for estimate in result.scores
        if estimate.score == main
    ]
    head = ["Score", *(result.arm_id for result in evaluation.arm_results)]
    rows = []
    for score in scores:
        found = [
            next((entry for entry in result.scores if entry.score == score), None)
            for result in evaluation.arm_results
        ]
        better = " <small>lower is better</small>" if any(e and lower_is_better(e) for e in found) else ""
        cells = [estimate_cell(estimate_words(entry)) if entry else "" for entry in found]
        rows.append([f"<code>{escaped_html(score)}</code>{better}", *cells])
    for words, entries in rows_apart(evaluation):
        cells = [estimate_cell(estimate_words(entry)) if entry else "" for entry in entries]
        rows.append([escaped_html(words), *cells])
    asked = [asked_with(result) for result in evaluation.arm_results]
    if any(asked):
        rows.append(["asked with", *map(escaped_html, asked)])
    rows.append(["cut answers", *(str(result.num_cut) for result in evaluation.arm_results)])
    rows.append(["records without an answer", *(str(result.num_errors) for result in evaluation.arm_results)])
    drawn = scrolled(f"{main} by arm", interval_chart(main, estimates))
    chart = f"<h3>{escaped_html(main)}</h3>{drawn}<h3>All scores</h3>"
    form = text_form_words(evaluation)
    compared = f"<p>Texts are compared in the Unicode form {escaped_html(form)}.</p>" if form else ""
    return section("Results", chart + table("All scores", head, rows, numbers_from=1) + compared)


def _cost(evaluation: Evaluation) -> str:
    results = evaluation.arm_results
    if not results:
        return ""
    rows = [
        ["prompt tokens read", *(f"{one.num_prompt_tokens:,}" for one in results)],
        ["tokens written", *(f"{one.num_generated_tokens:,}" for one in results)],
        ["seconds", *(f"{one.duration_seconds:.1f}" for one in results)],
    ]
    if any(one.tokens_per_second for one in results):
        rows.append(["tokens drawn each second", *(f"{one.tokens_per_second:.1f}" for one in results)])
    head = ["All records together", *(one.arm_id for one in results)]
    return section("What it cost", table("What it cost", head, rows, numbers_from=1))


def _by_module(patterns: Mapping[str, float]) -> str:
    return ", ".join(f"{pattern} {value:g}" for pattern, value in sorted(patterns.items()))


def _run(run: TuningRun) -> str:
    job = run.job
    settings, record = job.hyperparameters, job.run_record
    spans = job.HasField("start_time") and job.HasField("end_time")
    took = job.end_time.seconds - job.start_time.seconds - job.paused_seconds
    seconds = f"{took:,.0f} s" if spans else ""
    batch = f"{settings.batch_tokens:,} tokens" if settings.batch_tokens else f"{settings.batch_rows} rows"
    facts = [
        ("Base model", short(job.base_model)),
        ("Rendering", short(job.rendering)),
        ("Mixed in", ", ".join(f"{short(one.rendering)} {one.share:.0%}" for one in job.mixed_renderings)),
        ("Tuned model", short(job.tuned_model)),
        ("Steps", f"{job.progress.completed:,}" if job.progress.completed else ""),
        ("Attempts", str(job.num_attempts)),
        ("Time", seconds),
        ("LoRA", f"rank {job.lora.rank}, alpha {job.lora.alpha:g}{', rsLoRA' * job.lora.use_rslora}"),
        ("Ranks by module", _by_module(job.lora.rank_pattern)),
        ("Alphas by module", _by_module(job.lora.alpha_pattern)),
        ("Trained whole", ", ".join(job.lora.trained_modules)),
        ("DoRA", "yes" * job.lora.use_dora),
        ("LoRA+", f"{job.lora.lora_plus_ratio:g}" if job.lora.lora_plus_ratio else ""),
        ("Dropout", f"{job.lora.dropout:g}" if job.lora.dropout else ""),
        ("Adapted modules", ", ".join(job.lora.target_modules)),
        ("Step size", batch if settings.WhichOneof("batch_size") else ""),
        (
            "Learning rate",
            f"{settings.learning_rate:g},"
            f" {_enum_word(LearningRateSchedule.keys(), settings.learning_rate_schedule)}",
        ),
        ("Seed", str(settings.seed)),
    ]
    facts_of_record = [
        ("Device", record.device),
        ("Threads", str(record.num_threads or "")),
        ("Luthier", record.code_version),
        ("torch", record.torch_version),
        ("Kernels", ", ".join(f"{name}: {kind}" for name, kind in sorted(record.kernels.items()))),
        ("Kernel table", record.kernel_table_digest),
        ("Base model digest", record.base_model_digest),
        ("Rendering digest", record.rendering_digest),
        ("A resumed run is", _enum_word(Determinism.keys(), record.determinism)),
    ]
    curve = loss_curve(run.metrics)
    body = scrolled("Loss by step", curve) if curve else ""
    body += f'<div class="columns"><div><h3>Job</h3>{facts_table(facts)}</div>'
    body += f"<div><h3>Run record</h3>{facts_table(facts_of_record)}</div></div>"
    return section(f"Training: {short(job.name)}", body)


def _enum_word(names: Sequence[str], value: int) -> str:
    prefix = names[0].removesuffix("UNSPECIFIED")
    return names[value].removeprefix(prefix).replace("_", " ").lower() if value else ""


def _provenance(evaluation: Evaluation, models: Mapping[str, Model]) -> str:
    below = bases_below(evaluation)
    arms = [
        [
            escaped_html(arm.arm_id),
            f"<code>{escaped_html(short(arm.model))}</code>",
            *([f"<code>{escaped_html(short(below[arm.arm_id]))}</code>"] if below else []),
            shots_words(arm),
        ]
        for arm in evaluation.arms
    ]
    columns = ["Arm", "Model", *(["On"] if below else []), "Shots"]
    facts = [
        ("Evaluation", evaluation.name),
        ("Dataset version", evaluation.dataset_version),
        ("Dataset digest", evaluation.dataset_digest),
        ("Seed", str(evaluation.seed)),
        ("Longest answer", f"{evaluation.max_new_tokens} tokens" if evaluation.max_new_tokens else ""),
        *((f"System prompt of {arm_id}", text) for arm_id, text in system_prompts(evaluation).items()),
    ]
    rows = [
        [
            f"<code>{escaped_html(short(name))}</code>",
            escaped_html(Model.Kind.Name(model.kind).removeprefix("KIND_").lower()),
            escaped_html(model.architecture),
            f"{model.num_parameters:,}" if model.num_parameters else "",
            f"<code>{escaped_html(model.digest)}</code>",
        ]
        for name, model in models.items()
    ]
    body = facts_table(facts) + "<h3>Arms</h3>" + table("Arms", columns, arms, numbers_from=len(columns) - 1)
    if rows:
        head = ["Model", "Kind", "Architecture", "Parameters", "Digest"]
        body += "<h3>Models</h3>" + table("Models", head, rows)
    return section("Where it comes from", body)
