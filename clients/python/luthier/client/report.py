"""The HTML report of an evaluation: one file that needs no other, made from protobuf messages alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from luthier.client.askings import asked_with
from luthier.client.escaping import escaped_html
from luthier.client.names import short
from luthier.client.report_charts import interval_chart, loss_curve
from luthier.client.report_style import STYLE
from luthier.client.scores import (
    difference_words,
    estimate_words,
    is_right,
    is_share,
    lower_is_better,
    main_score,
    scores_of,
    text_form_words,
    verdict_word,
)
from luthier.v1.dataset_pb2 import Split
from luthier.v1.evaluation_pb2 import ArmPrediction, Comparison, Evaluation, Prediction
from luthier.v1.fine_tuning_job_pb2 import Determinism, FineTuningJob, LearningRateSchedule, MetricPoint
from luthier.v1.model_pb2 import Model

if TYPE_CHECKING:
    from luthier.client import Client

_MAX_CARDS = 200


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
    predictions = list(client.evaluations.predictions(found.name, page_size=200))
    return ReportData(evaluation=found, predictions=predictions, models=models, runs=list(runs.values()))


def render_report(data: ReportData) -> str:
    """Return the report as a complete HTML document."""
    evaluation = data.evaluation
    title = evaluation.display_name or short(evaluation.name)
    sections = (
        _headline(evaluation),
        "".join(f'<p class="warning">{escaped_html(warning)}</p>' for warning in evaluation.warnings),
        _results(evaluation),
        _comparisons(evaluation),
        *(_run(run) for run in data.runs),
        _answers(evaluation, data.predictions),
        _provenance(evaluation, data.models),
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaped_html(title)}: evaluation</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"{_header(evaluation, title)}\n{''.join(sections)}\n"
        "<footer>Made by Luthier. Intervals are 95 % intervals: Wilson's for scores that are right or wrong,"
        " bootstrap for others and for differences; comparisons are paired on the same records.</footer>\n"
        "</main>\n</body>\n</html>\n"
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


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escaped_html(title)}</h2>{body}</section>\n" if body else ""


def _headline(evaluation: Evaluation) -> str:
    """The last arm against the best of the others, on the strictest score there is."""
    comparison = headline_comparison(evaluation)
    if comparison is None:
        return ""
    word = verdict_word(comparison.verdict)
    unit = " percentage points" if is_share(comparison) else ""
    scale = 100 if is_share(comparison) else 1
    numbers = (
        f"{scale * comparison.difference:+.1f}{unit} [{scale * comparison.lower:+.1f},"
        f" {scale * comparison.upper:+.1f}]"
    )
    return (
        f'<section class="headline {_verdict_class(word)}">'
        f"<b>{escaped_html(comparison.candidate_arm_id)}</b> against <b>{escaped_html(comparison.baseline_arm_id)}</b>:"
        f" <strong>{escaped_html(numbers)}</strong> {_badge(word)}"
        f"<small>{escaped_html(comparison.score)}, {comparison.count} pairs, paired 95 % interval</small>"
        "</section>\n"
    )


def headline_comparison(evaluation: Evaluation) -> Comparison | None:
    """Return the last arm's comparison with its strongest rival on the strictest score; None without one."""
    if not evaluation.comparisons:
        return None
    last = evaluation.arms[-1].arm_id if evaluation.arms else evaluation.comparisons[-1].candidate_arm_id
    its = [comparison for comparison in evaluation.comparisons if comparison.candidate_arm_id == last]
    score = main_score(its)
    rivals = [comparison for comparison in its if comparison.score == score]
    if not rivals:
        return None
    weakest = max if lower_is_better(rivals[0]) else min
    return weakest(rivals, key=lambda comparison: comparison.difference)


def _results(evaluation: Evaluation) -> str:
    scores = scores_of(evaluation)
    if not scores:
        return ""
    main = main_score(entry for result in evaluation.arm_results for entry in result.scores) or scores[0]
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
        cells = [_estimate(estimate_words(entry)) if entry else "" for entry in found]
        rows.append([f"<code>{escaped_html(score)}</code>{better}", *cells])
    asked = [asked_with(result) for result in evaluation.arm_results]
    if any(asked):
        rows.append(["asked with", *map(escaped_html, asked)])
    rows.append(["cut answers", *(str(result.num_cut) for result in evaluation.arm_results)])
    rows.append(["records without an answer", *(str(result.num_errors) for result in evaluation.arm_results)])
    rows.append(["seconds", *(f"{result.duration_seconds:.1f}" for result in evaluation.arm_results)])
    chart = f"<h3>{escaped_html(main)}</h3>{interval_chart(main, estimates)}<h3>All scores</h3>"
    form = text_form_words(evaluation)
    compared = f"<p>Texts are compared in the Unicode form {escaped_html(form)}.</p>" if form else ""
    return _section("Results", chart + _table(head, rows, numbers_from=1) + compared)


def _estimate(text: str) -> str:
    value, _, bounds = text.partition(" [")
    return f"{escaped_html(value)} <small>[{escaped_html(bounds)}</small>"


def _comparisons(evaluation: Evaluation) -> str:
    rows = []
    for entry in evaluation.comparisons:
        rows.append(
            [
                f"<code>{escaped_html(entry.score)}</code>",
                f"{escaped_html(entry.candidate_arm_id)} − {escaped_html(entry.baseline_arm_id)}",
                _badge(verdict_word(entry.verdict)),
                _estimate(difference_words(entry)),
                f"{entry.p_value:.2g}" if entry.HasField("p_value") else "",
                f"{entry.count:,}",
            ]
        )
    head = ["Score", "Compared", "Verdict", "Difference", "p (McNemar)", "Pairs"]
    return _section("Paired comparisons", _table(head, rows, numbers_from=3) if rows else "")


def _by_module(patterns: Mapping[str, float]) -> str:
    return ", ".join(f"{pattern} {value:g}" for pattern, value in sorted(patterns.items()))


def _run(run: TuningRun) -> str:
    job = run.job
    settings, record = job.hyperparameters, job.run_record
    spans = job.HasField("start_time") and job.HasField("end_time")
    seconds = f"{job.end_time.seconds - job.start_time.seconds:,} s" if spans else ""
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
            f" {_enum_word(LearningRateSchedule, settings.learning_rate_schedule)}",
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
        ("A resumed run is", _enum_word(Determinism, record.determinism)),
    ]
    body = loss_curve(run.metrics)
    body += f'<div class="columns"><div><h3>Job</h3>{_facts(facts)}</div>'
    body += f"<div><h3>Run record</h3>{_facts(facts_of_record)}</div></div>"
    return _section(f"Training: {short(job.name)}", body)


def _enum_word(enum: object, value: int) -> str:
    names: Sequence[str] = enum.keys()  # type: ignore[attr-defined]
    prefix = names[0].removesuffix("UNSPECIFIED")
    return names[value].removeprefix(prefix).replace("_", " ").lower() if value else ""


def _answers(evaluation: Evaluation, predictions: Sequence[Prediction]) -> str:
    cards = "".join(_card(prediction) for prediction in predictions[:_MAX_CARDS])
    counts = []
    for arm in evaluation.arms:
        said = [a for p in predictions for a in p.answers if a.arm_id == arm.arm_id]
        marks = [is_right(answer) for answer in said if not answer.HasField("error")]
        if any(mark is not None for mark in marks):
            counts.append(
                f"{escaped_html(arm.arm_id)} {sum(mark is True for mark in marks)}/{len(marks)} right"
            )
    if len(predictions) > _MAX_CARDS:
        counts.append(f"the first {_MAX_CARDS} of {len(predictions):,} are shown")
    summary = f"<p>{' · '.join(counts)}</p>" if counts else ""
    return _section("Answers side by side", summary + cards if cards else "")


def _card(prediction: Prediction) -> str:
    turns = "\n".join(
        f"<b>{escaped_html(turn.role)}</b> {escaped_html(turn.content)}" for turn in prediction.prompt
    )
    reference = f'<div class="answer"><h4>reference</h4><pre>{escaped_html(prediction.reference)}</pre></div>'
    place = f"{prediction.filename}:{prediction.line}"
    answers = "".join(_answer(answer, place) for answer in prediction.answers)
    return (
        f'<div class="prediction"><p class="question">{turns}</p>'
        f'<div class="answers">{reference}{answers}</div></div>'
    )


def _answer(answer: ArmPrediction, place: str) -> str:
    right, text = is_right(answer), answer.text
    kind, mark = ("", "") if right is None else ("right", "✓ right") if right else ("wrong", "✗ wrong")
    if answer.HasField("error"):
        kind, mark, text = "wrong", "no answer", f"{place}: {answer.error.message}"
    return (
        f'<div class="answer {kind}"><h4>{escaped_html(answer.arm_id)}<span>{mark}</span></h4>'
        f"<pre>{escaped_html(text)}</pre></div>"
    )


def _provenance(evaluation: Evaluation, models: Mapping[str, Model]) -> str:
    arms = [
        [escaped_html(arm.arm_id), f"<code>{escaped_html(short(arm.model))}</code>", str(arm.num_shots)]
        for arm in evaluation.arms
    ]
    facts = [
        ("Evaluation", evaluation.name),
        ("Dataset version", evaluation.dataset_version),
        ("Dataset digest", evaluation.dataset_digest),
        ("Seed", str(evaluation.seed)),
        ("Longest answer", f"{evaluation.max_new_tokens} tokens" if evaluation.max_new_tokens else ""),
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
    body = _facts(facts) + "<h3>Arms</h3>" + _table(["Arm", "Model", "Shots"], arms, numbers_from=2)
    if rows:
        head = ["Model", "Kind", "Architecture", "Parameters", "Digest"]
        body += "<h3>Models</h3>" + _table(head, rows)
    return _section("Where it comes from", body)


def _facts(pairs: Iterable[tuple[str, str]]) -> str:
    rows = "".join(
        f"<tr><th>{escaped_html(label)}</th><td><code>{escaped_html(value)}</code></td></tr>"
        for label, value in pairs
        if value
    )
    return f'<table class="facts">{rows}</table>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers_from: int | None = None) -> str:
    """A table of cells that are HTML already; columns from `numbers_from` on stand to the right."""

    def kind(column: int) -> str:
        return ' class="number"' if numbers_from is not None and column >= numbers_from else ""

    top = "".join(f"<th{kind(column)}>{escaped_html(title)}</th>" for column, title in enumerate(head))
    body = "".join(
        "<tr>" + "".join(f"<td{kind(column)}>{cell}</td>" for column, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><tr>{top}</tr>{body}</table></div>'


def _badge(word: str) -> str:
    return f'<span class="badge {_verdict_class(word)}">{escaped_html(word)}</span>'


def _verdict_class(word: str) -> str:
    return word if word in ("better", "worse") else ""
