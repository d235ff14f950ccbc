"""The resource names of this service and of what it refers to."""

from __future__ import annotations

from collections.abc import Container

from luthier.runtime.names import Pattern, require_project

DATASET = Pattern("projects/{project}/datasets/{dataset}")
VERSION = Pattern("projects/{project}/datasets/{dataset}/versions/{version}")
UPLOAD = Pattern("projects/{project}/uploads/{upload}")
RENDERING = Pattern("projects/{project}/renderings/{rendering}")
MODEL = Pattern("projects/{project}/models/{model}")


def check_name(pattern: Pattern, name: str, projects: Container[str], *, field: str = "name") -> None:
    """Raise InvalidArgument for a malformed name, PermissionDenied for a project that is not served."""
    ids = pattern.parse(name, field=field)
    require_project(f"projects/{ids['project']}", projects, field=field)
