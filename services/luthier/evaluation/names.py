"""The resource names of this service and of what it refers to."""

from __future__ import annotations

from luthier.runtime.names import Pattern

EVALUATION = Pattern("projects/{project}/evaluations/{evaluation}")
VERSION = Pattern("projects/{project}/datasets/{dataset}/versions/{version}")
MODEL = Pattern("projects/{project}/models/{model}")
