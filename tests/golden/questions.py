"""All questions that a home can be asked through the public API, asked of the code of this checkout.

Every Get, every List with each filter that finds something and in both orders, every Watch from its first event,
and what can be read of records, rows, errors, predictions, files, checkpoints and metrics.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.golden.answers import PAGE, Answer, Asker

_DATA, _TRAINING = "luthier.v1.DataService", "luthier.v1.TrainingService"
_MODELS, _EVALUATION = "luthier.v1.ModelService", "luthier.v1.EvaluationService"
_FINAL = {"STATE_READY", "STATE_FAILED", "STATE_CANCELLED", "STATE_SUCCEEDED"}
_SPLITS = ("SPLIT_UNSPECIFIED", "SPLIT_TRAIN", "SPLIT_VALIDATION", "SPLIT_TEST")
_PLANNED = ("baseModel", "rendering", "lora", "hyperparameters", "checkpointIntervalSteps")
_MANY = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class _Family:
    """A kind of resource: the names of its rpcs, its field in List's answer, what List filters by beside labels."""

    service: str
    one: str
    many: str
    field: str
    filters: tuple[str, ...] = ("state",)


_DATASETS = _Family(service=_DATA, one="Dataset", many="Datasets", field="datasets", filters=())
_VERSIONS = _Family(service=_DATA, one="DatasetVersion", many="DatasetVersions", field="datasetVersions")
_RENDERINGS = _Family(service=_DATA, one="Rendering", many="Renderings", field="renderings")
_ALL_MODELS = _Family(
    service=_MODELS,
    one="Model",
    many="Models",
    field="models",
    filters=("state", "kind", "baseModel", "fineTuningJob"),
)
_JOBS = _Family(
    service=_TRAINING,
    one="FineTuningJob",
    many="FineTuningJobs",
    field="fineTuningJobs",
    filters=("state", "baseModel", "rendering"),
)
_EVALUATIONS = _Family(service=_EVALUATION, one="Evaluation", many="Evaluations", field="evaluations")


class Questions:
    """Asks everything; each method yields the answers in the order in which they were given."""

    def __init__(self, asker: Asker) -> None:
        self._asker = asker

    def all(self, projects: Sequence[str], uploads: Sequence[str]) -> Iterator[Answer]:
        """Ask everything about some projects, and about uploads, which no List finds."""
        for name in uploads:
            yield self._ask(f"{_DATA}/GetUpload", name=name)
        for parent in (f"projects/{project}" for project in projects):
            for dataset in (yield from self._resources(_DATASETS, parent)):
                for version in (yield from self._resources(_VERSIONS, dataset["name"])):
                    yield from self._of_version(version["name"])
            for rendering in (yield from self._resources(_RENDERINGS, parent)):
                yield from self._of_rendering(rendering["name"])
            for model in (yield from self._resources(_ALL_MODELS, parent)):
                yield from self._of_model(model["name"])
            for job in (yield from self._resources(_JOBS, parent)):
                yield from self._of_job(job, parent)
            for evaluation in (yield from self._resources(_EVALUATIONS, parent)):
                yield from self._pages(f"{_EVALUATION}/ListPredictions", _MANY, parent=evaluation["name"])
        yield self._ask(f"{_DATA}/GetDataset", name="projects/default/datasets/none")

    def _resources(self, family: _Family, parent: str) -> Generator[Answer, None, list[Any]]:
        """Ask for all lists of a family, and get and watch each resource; returns the resources."""
        rpc = f"{family.service}/List{family.many}"
        everything = self._ask(rpc, parent=parent, pageSize=_MANY)
        yield everything
        resources: list[Any] = everything["response"][family.field]
        yield from self._pages(rpc, 3, parent=parent, orderBy="create_time")
        for text in _filters(family, resources):
            yield self._ask(rpc, parent=parent, pageSize=_MANY, filter=text)
        for resource in resources:
            name = resource["name"]
            yield self._ask(f"{family.service}/Get{family.one}", name=name)
            watch = f"{family.service}/Watch{family.one}"
            if self._asker.has(watch):
                goes_on = resource["state"] not in _FINAL
                num_events = self._asker.count_events(watch, name) if goes_on else None
                yield self._asker.ask(watch, {"name": name}, num_events)
        return resources

    def _of_version(self, name: str) -> Iterator[Answer]:
        yield from self._pages(f"{_DATA}/ListDatasetVersionErrors", 2, parent=name)
        yield from self._pages(f"{_DATA}/ListRecords", 20, parent=name)
        for split in _SPLITS:
            yield self._ask(f"{_DATA}/ReadRecords", name=name, split=split)

    def _of_rendering(self, name: str) -> Iterator[Answer]:
        if self._asker.has(f"{_DATA}/ListRenderingErrors"):
            yield from self._pages(f"{_DATA}/ListRenderingErrors", 2, parent=name)
        yield self._ask(f"{_DATA}/PreviewRendering", name=name, pageSize=3)
        yield self._ask(f"{_DATA}/PreviewRendering", name=name, pageSize=1, unsupervisedOnly=True)
        for view in ("VIEW_FULL", "VIEW_LENGTHS"):
            for split in _SPLITS:
                yield self._ask(f"{_DATA}/ReadRendering", name=name, view=view, split=split)

    def _of_model(self, name: str) -> Iterator[Answer]:
        files = self._ask(f"{_MODELS}/ListModelFiles", parent=name)
        yield files
        for file in files.get("response", {}).get("files", []):
            yield self._ask(f"{_MODELS}/DownloadModelFile", name=name, path=file["path"])

    def _of_job(self, job: Mapping[str, Any], parent: str) -> Iterator[Answer]:
        name = job["name"]
        wanted = {field: job[field] for field in _PLANNED if job[field] is not None}
        yield self._ask(f"{_TRAINING}/PlanFineTuningJob", parent=parent, fineTuningJob=wanted)
        yield from self._pages(f"{_TRAINING}/ListFineTuningJobEvents", 40, parent=name)
        yield from self._pages(f"{_TRAINING}/ReadFineTuningJobMetrics", 40, name=name)
        yield from self._pages(f"{_TRAINING}/ListCheckpoints", 2, parent=name)
        for checkpoint in self._ask(f"{_TRAINING}/ListCheckpoints", parent=name)["response"]["checkpoints"]:
            yield self._ask(f"{_TRAINING}/GetCheckpoint", name=checkpoint["name"])

    def _pages(self, rpc: str, page_size: int, **request: Any) -> Iterator[Answer]:
        """Ask for page after page until the last."""
        answer = self._ask(rpc, pageSize=page_size, **request)
        yield answer
        while answer.get("response", {}).get("nextPageToken"):
            answer = self._ask(rpc, pageSize=page_size, pageToken=PAGE, **request)
            yield answer

    def _ask(self, rpc: str, **request: Any) -> Answer:
        return self._asker.ask(rpc, request)


def _filters(family: _Family, resources: list[Any]) -> list[str]:
    """Return each filter that finds one of the resources."""
    found = {
        f'{_snake(field)} = "{resource[field].removeprefix("STATE_").removeprefix("KIND_")}"'
        for resource in resources
        for field in family.filters
        if resource[field]
    }
    labels = {
        f'labels.{key} = "{value}"' for resource in resources for key, value in resource["labels"].items()
    }
    both = {f"{label} AND {one}" for label in labels for one in found if one.startswith("state")}
    return sorted(found | labels | both)


def _snake(field: str) -> str:
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in field)
