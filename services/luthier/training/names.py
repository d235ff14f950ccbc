"""The resource names of this service and of what it refers to."""

from __future__ import annotations

from luthier.runtime.names import AnyOf, Pattern

JOB = Pattern("projects/{project}/fineTuningJobs/{fine_tuning_job}")
CHECKPOINT = Pattern("projects/{project}/fineTuningJobs/{fine_tuning_job}/checkpoints/{checkpoint}")
MODEL = Pattern("projects/{project}/models/{model}")
WEIGHTS = AnyOf((MODEL, CHECKPOINT))
RENDERING = Pattern("projects/{project}/renderings/{rendering}")


def is_checkpoint(name: str) -> bool:
    """Tell whether a name that `WEIGHTS` allows is a checkpoint's."""
    return name.count("/") == CHECKPOINT.text.count("/")
