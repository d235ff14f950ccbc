"""A run's metrics as files of TensorBoard, written by TensorBoard's own package (extra `tensorboard`)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from google.protobuf import json_format

from luthier.errors import AlreadyExists, FailedPrecondition
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob, MetricPoint

_SETTINGS = ("base_model", "rendering", "hyperparameters", "lora", "full", "preference", "reinforcement")


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


def _settings(job: FineTuningJob) -> str:
    """Return what was asked for as a block of Markdown."""
    told = json_format.MessageToDict(job, preserving_proto_field_name=True)
    kept = {name: told[name] for name in _SETTINGS if name in told}
    return f"```\n{json.dumps(kept, indent=2)}\n```"
