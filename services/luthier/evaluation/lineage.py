"""What tuned models learnt from: the dataset versions of their jobs, as far back as models go on from models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from luthier.errors import NotFound
from luthier.v1.dataset_pb2 import DatasetVersion
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob
from luthier.v1.model_pb2 import Model
from luthier.v1.reference_pb2 import Reference
from luthier.v1.rendering_pb2 import Rendering

MAX_VERSIONS = 256


class Origins(Protocol):
    """The other services, as far as lineage leads there. Every method raises NotFound, and Unavailable."""

    async def model(self, name: str) -> Model:
        """Return a model."""
        ...

    async def job(self, name: str) -> FineTuningJob:
        """Return a job."""
        ...

    async def rendering(self, name: str) -> Rendering:
        """Return a rendering."""
        ...

    async def version(self, name: str) -> DatasetVersion:
        """Return a dataset version."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LearntFrom:
    """The versions, as they are, and the models of which not everything is known any more."""

    versions: tuple[Reference, ...]
    unknown: tuple[str, ...]


async def learnt_from(models: Iterable[Model], origins: Origins) -> LearntFrom:
    """Return what tuned models learnt from, and the models that they went on from. Raises Unavailable."""
    wanted = list({model.name: model for model in models}.values())
    asked_for = [model.name for model in wanted]
    seen, versions, unknown = set(asked_for), dict[str, Reference](), dict[str, None]()
    roots = {model.name: model.name for model in wanted}
    while wanted:
        model = wanted.pop()
        root = roots[model.name]
        try:
            versions |= {version.name: version for version in await _versions(model, origins)}
        except (_Gone, NotFound):
            unknown[root] = None
        for name in [name for name in _ancestors(model) if name not in seen]:
            roots[name] = root
            seen.add(name)
            try:
                wanted.append(await _ancestor(model, name, origins))
            except (_Gone, NotFound):
                unknown[root] = None
    kept = tuple(versions.values())[:MAX_VERSIONS]
    if len(versions) > MAX_VERSIONS:
        unknown |= dict.fromkeys(asked_for)
    return LearntFrom(versions=kept, unknown=tuple(unknown))


class _Gone(Exception):
    """What a name means now is not what the model was made from."""


def _ancestors(model: Model) -> Iterator[str]:
    if model.fine_tuning_job:
        yield from filter(None, dict.fromkeys((model.base_model, model.start_from)))


async def _ancestor(model: Model, name: str, origins: Origins) -> Model:
    found = await origins.model(name)
    _require_same(model.references, found)
    return found


async def _versions(model: Model, origins: Origins) -> list[Reference]:
    """Return the versions of a model's own job; none for one that no job tuned."""
    if not model.fine_tuning_job:
        if model.base_model:  # an adapter from elsewhere
            raise _Gone
        return []
    job = await origins.job(model.fine_tuning_job)
    _require_same(model.references, job)
    found = []
    for name in dict.fromkeys((job.rendering, *(share.rendering for share in job.mixed_renderings))):
        rendering = await origins.rendering(name)
        _require_same(job.references, rendering)
        version = await origins.version(rendering.dataset_version)
        _require_same(rendering.references, version)
        found.append(Reference(name=version.name, uid=version.uid, digest=version.digest))
    return found


def _require_same(
    references: Iterable[Reference], found: Model | FineTuningJob | Rendering | DatasetVersion
) -> None:
    """Raise unless a resource is the one that another was made from; what is older than uids is taken at its name."""
    uids = {reference.uid for reference in references if reference.name == found.name}
    if uids - {""} and found.uid not in uids:
        raise _Gone
