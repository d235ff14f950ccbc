"""Jobs that train. Their series have the job's name, are there while a worker has it, and are removed when it ends."""

from luthier.runtime.metric import Metric, Service

MOST_JOBS = 1000
"""Jobs that have series at a time; one more has none until another ends."""
PHASES = ("data", "compute", "sampling", "validation", "checkpoint", "waiting")
"""What a step's time is spent on: reading rows, passes and update, drawing and grading answers, validating, copying a
checkpoint and waiting for the one before, telling the driver."""
_JOB = ("fine_tuning_job",)
_JOBS = f"one a job that trains, at most {MOST_JOBS} jobs"
_IN: tuple[Service, ...] = ("training",)

JOBS = Metric(
    name="luthier_training_jobs",
    kind="gauge",
    help="Jobs that have series here, since a worker has them.",
    question="How many jobs train just now?",
    services=_IN,
)
STEP = Metric(
    name="luthier_training_step",
    kind="gauge",
    help="Optimiser steps made.",
    question="Does the job move?",
    labels=_JOB,
    unit="steps",
    services=_IN,
    bound=_JOBS,
)
LOSS = Metric(
    name="luthier_training_loss",
    kind="gauge",
    help="train_loss of the last step.",
    question="Does it learn?",
    labels=_JOB,
    services=_IN,
    bound=_JOBS,
)
VALIDATION_LOSS = Metric(
    name="luthier_training_validation_loss",
    kind="gauge",
    help="validation_loss of the last validation.",
    question="Does it generalise?",
    labels=_JOB,
    services=_IN,
    bound=_JOBS,
)
GRADIENT_NORM = Metric(
    name="luthier_training_gradient_norm",
    kind="gauge",
    help="grad_norm of the last step, before it is clipped.",
    question="Is training stable?",
    labels=_JOB,
    services=_IN,
    bound=_JOBS,
)
TOKENS = Metric(
    name="luthier_training_tokens_total",
    kind="counter",
    help="Tokens of the steps that were made since the service saw the attempt first.",
    question="How fast is it?",
    labels=_JOB,
    unit="tokens",
    services=_IN,
    bound=_JOBS,
)
SUPERVISED_TOKENS = Metric(
    name="luthier_training_supervised_tokens_total",
    kind="counter",
    help="Tokens of those that were learnt.",
    question="How much of the work teaches something?",
    labels=_JOB,
    unit="tokens",
    services=_IN,
    bound=_JOBS,
)
STEP_SECONDS = Metric(
    name="luthier_training_step_seconds",
    kind="gauge",
    help="Time of the last step, validation and checkpoint left out.",
    question="Is it slower than it was?",
    labels=_JOB,
    unit="seconds",
    services=_IN,
    bound=_JOBS,
)
PHASE_SECONDS = Metric(
    name="luthier_training_phase_seconds_total",
    kind="counter",
    help="Time of the attempt by phase: data, compute, sampling, validation, checkpoint, waiting.",
    question="What share of the time is training (goodput)?",
    labels=(*_JOB, "phase"),
    unit="seconds",
    services=_IN,
    bound=f"six a job that trains, at most {MOST_JOBS} jobs",
)
LAST_STEP = Metric(
    name="luthier_training_last_step_timestamp_seconds",
    kind="gauge",
    help="When the last step was reported; before the first: when the attempt began, or last told what it does.",
    question="Is it stalled?",
    labels=_JOB,
    unit="timestamp",
    services=_IN,
    bound=_JOBS,
)
EXPECTED_END = Metric(
    name="luthier_training_expected_end_timestamp_seconds",
    kind="gauge",
    help="When it will have made all steps, by its own estimate; no series before there is one.",
    question="When will it be done?",
    labels=_JOB,
    unit="timestamp",
    services=_IN,
    bound=_JOBS,
)
MEMORY = Metric(
    name="luthier_training_memory_bytes",
    kind="gauge",
    help="The most memory that the attempt has held: of its process on a CPU, of its device on a GPU.",
    question="How near is it to its limit?",
    labels=_JOB,
    unit="bytes",
    services=_IN,
    bound=_JOBS,
)
DEVICE_USE = Metric(
    name="luthier_training_device_use_ratio",
    kind="gauge",
    help="CPU time by wall time and thread since the report before. No series on GPUs: dcgm-exporter says it.",
    question="Is the device busy?",
    labels=_JOB,
    unit="ratio",
    services=_IN,
    bound=_JOBS,
)
CHECKPOINT_TIME = Metric(
    name="luthier_training_checkpoint_timestamp_seconds",
    kind="gauge",
    help="When its last checkpoint was committed; before the first: when its first step was reported.",
    question="How much would a crash lose?",
    labels=_JOB,
    unit="timestamp",
    services=_IN,
    bound=_JOBS,
)
REWARD = Metric(
    name="luthier_training_reward",
    kind="gauge",
    help="reward_mean of the last step. Reinforcement alone.",
    question="Do its answers get better?",
    labels=_JOB,
    services=_IN,
    bound=_JOBS,
)
KL = Metric(
    name="luthier_training_kl",
    kind="gauge",
    help="kl of the last step: how far the model is from its reference. Reinforcement with kl_weight alone.",
    question="Does it leave the model that it began as?",
    labels=_JOB,
    unit="nats",
    services=_IN,
    bound=_JOBS,
)
GAP = Metric(
    name="luthier_training_sampler_gap",
    kind="gauge",
    help="sampler_trainer_gap of the last step. Reinforcement alone.",
    question="Is what draws what learns?",
    labels=_JOB,
    unit="nats",
    services=_IN,
    bound=_JOBS,
)
