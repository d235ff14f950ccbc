"""The resource names of this service and of what it refers to."""

from __future__ import annotations

from luthier.runtime.names import Pattern

JOB = Pattern("projects/{project}/fineTuningJobs/{fine_tuning_job}")
CHECKPOINT = Pattern("projects/{project}/fineTuningJobs/{fine_tuning_job}/checkpoints/{checkpoint}")
MODEL = Pattern("projects/{project}/models/{model}")
RENDERING = Pattern("projects/{project}/renderings/{rendering}")
