"""Jobs, checkpoints, plans and TRAIN tasks between the wire and values."""

from __future__ import annotations

from collections.abc import Sequence

from luthier.training.convert import enum_from_proto, set_time
from luthier.training.jobs.domain import (
    Checkpoint,
    CheckpointFile,
    Determinism,
    Hyperparameters,
    Job,
    LearningRateSchedule,
    LoraSettings,
    MetricPoint,
    Plan,
    Progress,
    RunRecord,
)
from luthier.training.jobs.lifecycle import ToTrain
from luthier.training.jobs.settings import HyperparametersRequest, JobRequest, LoraRequest
from luthier.v1 import event_pb2, fine_tuning_job_pb2, model_pb2
from luthier.work.convert import failure_to_status
from luthier.worker.v1 import task_pb2


def job_request(message: fine_tuning_job_pb2.FineTuningJob) -> JobRequest:
    """Read what a caller asks for. Raises InvalidArgument for an unknown enum number."""
    return JobRequest(
        base_model=message.base_model,
        rendering=message.rendering,
        display_name=message.display_name,
        labels=dict(message.labels),
        lora=_lora_request(message.lora),
        hyperparameters=_hyperparameters_request(message.hyperparameters),
        checkpoint_interval_steps=message.checkpoint_interval_steps,
        max_checkpoints=message.max_checkpoints,
        validation_interval_steps=message.validation_interval_steps,
        tuned_model_id=message.tuned_model_id,
    )


def _lora_request(message: fine_tuning_job_pb2.LoraConfig) -> LoraRequest:
    return LoraRequest(
        rank=message.rank if message.HasField("rank") else None,
        alpha=message.alpha if message.HasField("alpha") else None,
        target_modules=tuple(message.target_modules),
        use_rslora=message.use_rslora,
    )


def _hyperparameters_request(message: fine_tuning_job_pb2.Hyperparameters) -> HyperparametersRequest:
    batch = message.WhichOneof("batch_size")
    return HyperparametersRequest(
        num_epochs=message.num_epochs,
        max_steps=message.max_steps,
        batch_tokens=message.batch_tokens if batch == "batch_tokens" else None,
        batch_rows=message.batch_rows if batch == "batch_rows" else None,
        micro_batch_tokens=message.micro_batch_tokens,
        learning_rate=message.learning_rate if message.HasField("learning_rate") else None,
        warmup_steps=message.warmup_steps,
        learning_rate_schedule=enum_from_proto(
            LearningRateSchedule,
            fine_tuning_job_pb2.LearningRateSchedule,
            "LEARNING_RATE_SCHEDULE_",
            message.learning_rate_schedule,
            "fine_tuning_job.hyperparameters.learning_rate_schedule",
        ),
        weight_decay=message.weight_decay,
        max_grad_norm=message.max_grad_norm if message.HasField("max_grad_norm") else None,
        seed=message.seed,
    )


def job_to_proto(job: Job) -> fine_tuning_job_pb2.FineTuningJob:
    """Write a job."""
    message = fine_tuning_job_pb2.FineTuningJob(
        name=job.name,
        uid=job.uid,
        display_name=job.display_name,
        labels=job.labels,
        state=fine_tuning_job_pb2.FineTuningJob.State.Value(f"STATE_{job.state}"),
        base_model=job.base_model,
        rendering=job.rendering,
        lora=_lora_to_proto(job.lora),
        hyperparameters=_hyperparameters_to_proto(job.hyperparameters),
        checkpoint_interval_steps=job.checkpoint_interval_steps,
        max_checkpoints=job.max_checkpoints,
        validation_interval_steps=job.validation_interval_steps,
        tuned_model_id=job.tuned_model_id,
        tuned_model=job.tuned_model,
        latest_metrics=job.latest_metrics,
        num_attempts=job.num_attempts,
        etag=job.etag,
    )
    if job.progress is not None:
        message.progress.CopyFrom(_progress_to_proto(job.progress))
    if job.run_record is not None:
        message.run_record.CopyFrom(_run_record_to_proto(job.run_record))
    if job.failure is not None:
        message.error.CopyFrom(failure_to_status(job.failure))
    set_time(message.create_time, job.create_time)
    set_time(message.start_time, job.start_time)
    set_time(message.end_time, job.end_time)
    set_time(message.update_time, job.update_time)
    return message


def _lora_to_proto(lora: LoraSettings) -> fine_tuning_job_pb2.LoraConfig:
    return fine_tuning_job_pb2.LoraConfig(
        rank=lora.rank, alpha=lora.alpha, target_modules=lora.target_modules, use_rslora=lora.use_rslora
    )


def _hyperparameters_to_proto(chosen: Hyperparameters) -> fine_tuning_job_pb2.Hyperparameters:
    schedule = f"LEARNING_RATE_SCHEDULE_{chosen.learning_rate_schedule}"
    message = fine_tuning_job_pb2.Hyperparameters(
        num_epochs=chosen.num_epochs,
        max_steps=chosen.max_steps,
        micro_batch_tokens=chosen.micro_batch_tokens,
        learning_rate=chosen.learning_rate,
        warmup_steps=chosen.warmup_steps,
        learning_rate_schedule=fine_tuning_job_pb2.LearningRateSchedule.Value(schedule),
        weight_decay=chosen.weight_decay,
        max_grad_norm=chosen.max_grad_norm,
        seed=chosen.seed,
    )
    if chosen.batch_rows:
        message.batch_rows = chosen.batch_rows
    else:
        message.batch_tokens = chosen.batch_tokens
    return message


def _progress_to_proto(progress: Progress) -> event_pb2.Progress:
    return event_pb2.Progress(
        phase=progress.phase,
        completed=progress.completed,
        total=progress.total,
        unit=progress.unit,
        remaining_seconds=progress.remaining_seconds,
    )


def _run_record_to_proto(record: RunRecord) -> fine_tuning_job_pb2.RunRecord:
    return fine_tuning_job_pb2.RunRecord(
        code_version=record.code_version,
        base_model_digest=record.base_model_digest,
        rendering_digest=record.rendering_digest,
        device=record.device,
        torch_version=record.torch_version,
        num_threads=record.num_threads,
        kernel_table_digest=record.kernel_table_digest,
        kernels=record.kernels,
        determinism=fine_tuning_job_pb2.Determinism.Value(f"DETERMINISM_{record.determinism}"),
    )


def run_record_from_proto(message: fine_tuning_job_pb2.RunRecord) -> RunRecord:
    """Read what exactly runs. Raises InvalidArgument for an unknown enum number."""
    determinism = enum_from_proto(
        Determinism,
        fine_tuning_job_pb2.Determinism,
        "DETERMINISM_",
        message.determinism,
        "run_record.determinism",
    )
    return RunRecord(
        code_version=message.code_version,
        base_model_digest=message.base_model_digest,
        rendering_digest=message.rendering_digest,
        device=message.device,
        torch_version=message.torch_version,
        num_threads=message.num_threads,
        kernel_table_digest=message.kernel_table_digest,
        kernels=dict(message.kernels),
        determinism=determinism or Determinism.UNSPECIFIED,
    )


def plan_to_proto(plan: Plan, resolved: Job) -> fine_tuning_job_pb2.FineTuningPlan:
    """Write a plan and the job that it is of; the job has neither name nor times, as it does not exist."""
    job = job_to_proto(resolved)
    for unknown in ("name", "uid", "state", "create_time", "update_time", "etag"):
        job.ClearField(unknown)
    return fine_tuning_job_pb2.FineTuningPlan(
        num_train_rows=plan.num_train_rows,
        num_validation_rows=plan.num_validation_rows,
        num_steps=plan.num_steps,
        num_steps_per_epoch=plan.num_steps_per_epoch,
        num_tokens=plan.num_tokens,
        num_supervised_tokens=plan.num_supervised_tokens,
        packing_efficiency=plan.packing_efficiency,
        num_dropped=plan.num_dropped,
        num_truncated=plan.num_truncated,
        num_unsupervised=plan.num_unsupervised,
        warnings=plan.warnings,
        resolved_job=job,
    )


def checkpoint_to_proto(checkpoint: Checkpoint) -> fine_tuning_job_pb2.Checkpoint:
    """Write a checkpoint."""
    message = fine_tuning_job_pb2.Checkpoint(
        name=checkpoint.name,
        uid=checkpoint.uid,
        step=checkpoint.step,
        attempt=checkpoint.attempt,
        metrics=checkpoint.metrics,
        digest=checkpoint.digest,
        size_bytes=checkpoint.size_bytes,
    )
    set_time(message.create_time, checkpoint.create_time)
    return message


def point_to_proto(point: MetricPoint) -> fine_tuning_job_pb2.MetricPoint:
    """Write the metrics of one step."""
    return fine_tuning_job_pb2.MetricPoint(step=point.step, attempt=point.attempt, values=point.values)


def files_from_proto(files: Sequence[task_pb2.BlobFile]) -> tuple[CheckpointFile, ...]:
    """Read the files of a checkpoint."""
    return tuple(
        CheckpointFile(path=file.path, sha256=file.sha256, size_bytes=file.size_bytes) for file in files
    )


def train_spec(found: ToTrain) -> task_pb2.Task:
    """Say what to train."""
    spec = task_pb2.TrainSpec(
        job=job_to_proto(found.job),
        base_model_files=[
            model_pb2.ModelFile(
                path=file.path, size_bytes=file.size_bytes, sha256=file.sha256, tokenizer=file.tokenizer
            )
            for file in found.base_model.files
        ],
        base_model_digest=found.base_model.digest,
        rendering_digest=found.job.rendering_digest,
    )
    if found.checkpoint is not None:
        spec.checkpoint_step = found.checkpoint.step
        spec.checkpoint_files.extend(
            task_pb2.BlobFile(path=file.path, sha256=file.sha256, size_bytes=file.size_bytes)
            for file in found.checkpoint.files
        )
    return task_pb2.Task(train=spec)
