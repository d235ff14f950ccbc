"""The resource names of this service and of what it refers to."""

from __future__ import annotations

from luthier.runtime.names import AnyOf, Pattern

EVALUATION = Pattern("projects/{project}/evaluations/{evaluation}")
ALIAS = Pattern("projects/{project}/modelAliases/{model_alias}")
MODEL = Pattern("projects/{project}/models/{model}")
VERSION = Pattern("projects/{project}/datasets/{dataset}/versions/{version}")
WEIGHTS = AnyOf(
    (
        MODEL,
        Pattern("projects/{project}/fineTuningJobs/{fine_tuning_job}/checkpoints/{checkpoint}"),
    )
)
"""What can be asked: a model, or a checkpoint as the model that it would be."""
