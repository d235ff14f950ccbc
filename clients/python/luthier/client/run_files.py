"""A run's metrics as files of TensorBoard and of MLflow, written by their own packages (extras of the same names)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from google.protobuf import json_format

from luthier.client.config import prepare_mlflow
from luthier.client.names import short
from luthier.errors import AlreadyExists, FailedPrecondition
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob, MetricPoint

T = TypeVar("T")
_SETTINGS = ("base_model", "rendering", "hyperparameters", "lora", "full", "preference", "reinforcement")
# What a batch of MLflow may hold, and a parameter of it.
_MLFLOW_VALUES, _MLFLOW_PARAMS, _MLFLOW_PARAM = 1000, 100, 6000
_MLFLOW_STATUS = {FineTuningJob.STATE_FAILED: "FAILED", FineTuningJob.STATE_CANCELLED: "KILLED"}


def write_tensorboard(job: FineTuningJob, points: Iterable[MetricPoint], folder: Path) -> int:
    """Write a job's metrics by step, and its settings as a text, into a new folder; returns how many values they are.

    `tensorboard --logdir` shows it beside other runs when their folders lie in one. All values have one wall time, the
    job's end, or its beginning while it runs: metrics are kept by step.

    Raises:
        AlreadyExists: the folder holds something.
        FailedPrecondition: TensorBoard is not installed.
    """
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.text import metadata as texts
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
        from tensorboard.util.tensor_util import make_tensor_proto
    except ImportError as error:
        raise FailedPrecondition(
            "writing TensorBoard files needs TensorBoard: pip install 'luthier-client[tensorboard]'"
        ) from error
    if folder.exists() and any(folder.iterdir()):
        raise AlreadyExists(f"{folder} holds something: give a new or an empty folder")
    wall_time = (job.end_time if job.HasField("end_time") else job.start_time).ToMicroseconds() / 1e6
    writer = EventFileWriter(str(folder))
    try:
        described = Summary.Value(
            tag="settings",
            metadata=texts.create_summary_metadata(display_name="settings", description=job.name),
            tensor=make_tensor_proto([_settings(job).encode()]),
        )
        writer.add_event(Event(wall_time=wall_time, step=0, summary=Summary(value=[described])))
        count = 0
        for point in points:
            values = [
                Summary.Value(tag=name, simple_value=value) for name, value in sorted(point.values.items())
            ]
            writer.add_event(Event(wall_time=wall_time, step=point.step, summary=Summary(value=values)))
            count += len(values)
    finally:
        writer.close()
    return count


def write_mlflow(job: FineTuningJob, points: Iterable[MetricPoint], folder: Path) -> int:
    """Add a job to a file store of MLflow as a run: metrics by step, settings as parameters; returns how many values.

    The store may be a new folder or hold other runs; the experiment is called as the project is. All values have one
    time, as in `write_tensorboard`. The run is RUNNING until all is written.

    Raises:
        AlreadyExists: the store has a run of this job.
        FailedPrecondition: MLflow is not installed.
    """
    prepare_mlflow()
    try:
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient
    except ImportError as error:
        raise FailedPrecondition(
            "writing runs of MLflow needs MLflow: pip install 'luthier-client[mlflow]'"
        ) from error
    client = MlflowClient(tracking_uri=folder.resolve().as_uri())
    name = job.name.partition("/fineTuningJobs/")[0].removeprefix("projects/")
    found = client.get_experiment_by_name(name)
    experiment = client.create_experiment(name) if found is None else found.experiment_id
    if client.search_runs([experiment], f"tags.`luthier.uid` = '{job.uid}'", max_results=1):
        raise AlreadyExists(
            f"{folder} has a run of {job.name} already: give another folder, or delete that run"
        )
    started, ended = job.start_time.ToMilliseconds(), job.end_time.ToMilliseconds()
    tags = {"luthier.job": job.name, "luthier.uid": job.uid, "luthier.model": job.tuned_model}
    run = client.create_run(experiment, start_time=started, run_name=short(job.name), tags=tags)
    params = [Param(key, text[:_MLFLOW_PARAM]) for key, text in _flat(_asked(job))]
    for few in _batched(params, _MLFLOW_PARAMS):
        client.log_batch(run.info.run_id, params=few)
    count = 0
    values = (
        Metric(key, value, ended or started, point.step)
        for point in points
        for key, value in sorted(point.values.items())
    )
    for some in _batched(values, _MLFLOW_VALUES):
        client.log_batch(run.info.run_id, metrics=some)
        count += len(some)
    if job.HasField("end_time"):
        client.set_terminated(run.info.run_id, _MLFLOW_STATUS.get(job.state, "FINISHED"), ended)
    return count


def _batched(items: Iterable[T], most: int) -> Iterator[list[T]]:
    """Yield items in lists of `most`, the last one shorter."""
    waiting = iter(items)
    while some := list(islice(waiting, most)):
        yield some


def _flat(told: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """Yield each value of a tree by its path, lists as JSON."""
    for name, value in told.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{name}.")
        else:
            yield path + name, value if isinstance(value, str) else json.dumps(value)


def _asked(job: FineTuningJob) -> dict[str, Any]:
    """Return what was asked for."""
    told = json_format.MessageToDict(job, preserving_proto_field_name=True)
    return {name: told[name] for name in _SETTINGS if name in told}


def _settings(job: FineTuningJob) -> str:
    """Return what was asked for as a block of Markdown."""
    return f"```\n{json.dumps(_asked(job), indent=2)}\n```"
