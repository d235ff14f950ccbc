"""The resource names of this service and of what it refers to."""

from __future__ import annotations

from luthier.runtime.names import Pattern

DATASET = Pattern("projects/{project}/datasets/{dataset}")
VERSION = Pattern("projects/{project}/datasets/{dataset}/versions/{version}")
UPLOAD = Pattern("projects/{project}/uploads/{upload}")
RENDERING = Pattern("projects/{project}/renderings/{rendering}")
MODEL = Pattern("projects/{project}/models/{model}")
