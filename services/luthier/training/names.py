"""The resource names of this service and of what it refers to."""

from __future__ import annotations

from collections.abc import Container

from luthier.runtime.names import Pattern, require_project

JOB = Pattern("projects/{project}/fineTuningJobs/{fine_tuning_job}")
CHECKPOINT = Pattern("projects/{project}/fineTuningJobs/{fine_tuning_job}/checkpoints/{checkpoint}")
MODEL = Pattern("projects/{project}/models/{model}")
RENDERING = Pattern("projects/{project}/renderings/{rendering}")


def check_name(pattern: Pattern, name: str, projects: Container[str], *, field: str = "name") -> None:
    """Raise InvalidArgument for a malformed name, PermissionDenied for a project that is not served."""
    ids = pattern.parse(name, field=field)
    require_project(f"projects/{ids['project']}", projects, field=field)
