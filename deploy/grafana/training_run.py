"""A training run: does it learn, how fast, on what its time goes, what a crash would lose."""

from __future__ import annotations

from deploy.grafana.builder import Dashboard, Panel, Query, Row, Variable
from deploy.grafana.expressions import WINDOW, mean, quantile

_JOB = 'fine_tuning_job=~"$fine_tuning_job"'
_LEGEND = "{{fine_tuning_job}}"


def _of_job(metric: str, legend: str = _LEGEND) -> Query:
    return Query(expr=f"{metric}{{{_JOB}}}", legend=legend)


def _speed(metric: str, legend: str) -> Query:
    return Query(expr=f"rate({metric}{{{_JOB}}}[{WINDOW}])", legend=legend)


_PHASES = f"rate(luthier_training_phase_seconds_total{{{_JOB}}}[{WINDOW}])"
_LEARNING = Row(
    title="Does it learn?",
    panels=(
        Panel(
            title="Loss",
            queries=(
                _of_job("luthier_training_loss", f"{_LEGEND} training"),
                _of_job("luthier_training_validation_loss", f"{_LEGEND} validation"),
            ),
            about="Validation that rises while training falls: it learns by heart.",
        ),
        Panel(title="Gradient norm", queries=(_of_job("luthier_training_gradient_norm"),)),
        Panel(title="Steps", queries=(_of_job("luthier_training_step"),)),
    ),
)
_REWARDS = Row(
    title="Reinforcement",
    panels=(
        Panel(title="Reward", queries=(_of_job("luthier_training_reward"),)),
        Panel(
            title="KL to the reference",
            queries=(_of_job("luthier_training_kl"),),
            about="Only of jobs with kl_weight. One that runs away: the grader is gamed.",
        ),
        Panel(
            title="Gap between sampler and trainer",
            queries=(_of_job("luthier_training_sampler_gap"),),
            about="More than 0.1 is no rounding: what is drawn from may not be what learns.",
        ),
    ),
)
_SPEED = Row(
    title="How fast?",
    panels=(
        Panel(
            title="Tokens a second",
            width=6,
            queries=(
                _speed("luthier_training_tokens_total", f"{_LEGEND} all"),
                _speed("luthier_training_supervised_tokens_total", f"{_LEGEND} learnt"),
            ),
        ),
        Panel(title="Seconds a step", unit="s", width=6, queries=(_of_job("luthier_training_step_seconds"),)),
        Panel(
            title="Where time goes",
            unit="percentunit",
            stacked=True,
            width=6,
            queries=(
                Query(
                    expr=f"sum by (phase) ({_PHASES}) / scalar(sum({_PHASES}))",
                    legend="{{phase}}",
                ),
            ),
            about="Goodput is compute and sampling. data: rows are read too slowly. checkpoint: the store is too slow.",
        ),
        Panel(
            title="Goodput",
            unit="percentunit",
            width=6,
            queries=(
                Query(
                    expr="sum by (fine_tuning_job) (rate(luthier_training_phase_seconds_total"
                    f'{{{_JOB}, phase=~"compute|sampling"}}[{WINDOW}])) / sum by (fine_tuning_job) ({_PHASES})',
                    legend=_LEGEND,
                ),
            ),
        ),
    ),
)
_MACHINE = Row(
    title="On what?",
    panels=(
        Panel(title="Memory", unit="bytes", width=6, queries=(_of_job("luthier_training_memory_bytes"),)),
        Panel(
            title="Use of the device",
            unit="percentunit",
            width=6,
            queries=(_of_job("luthier_training_device_use_ratio"),),
            about="Of processors. For GPUs put DCGM_FI_PROF_GR_ENGINE_ACTIVE of dcgm-exporter beside it.",
        ),
        Panel(
            title="Done in",
            unit="s",
            width=6,
            queries=(
                Query(
                    expr=f"luthier_training_expected_end_timestamp_seconds{{{_JOB}}} - time()", legend=_LEGEND
                ),
            ),
        ),
        Panel(
            title="A crash would lose",
            unit="s",
            width=6,
            queries=(
                Query(
                    expr=f"time() - luthier_training_checkpoint_timestamp_seconds{{{_JOB}}}", legend=_LEGEND
                ),
            ),
            about="Time since the last checkpoint.",
        ),
    ),
)
_CHECKPOINTS = Row(
    title="Checkpoints of all jobs",
    panels=(
        Panel(
            title="Seconds to store one",
            unit="s",
            width=12,
            queries=(
                Query(expr=quantile(0.5, "luthier_checkpoint_seconds", "kind"), legend="{{kind}} median"),
                Query(expr=quantile(0.99, "luthier_checkpoint_seconds", "kind"), legend="{{kind}} 99 %"),
            ),
        ),
        Panel(
            title="Mean size",
            unit="bytes",
            width=12,
            queries=(Query(expr=mean("luthier_checkpoint_bytes", "kind"), legend="{{kind}}"),),
        ),
    ),
)
BOARD = Dashboard(
    uid="luthier-training-run",
    title="Luthier / A training run",
    rows=(_LEARNING, _SPEED, _MACHINE, _REWARDS, _CHECKPOINTS),
    variables=(Variable(name="fine_tuning_job", metric="luthier_training_step", label="fine_tuning_job"),),
)
