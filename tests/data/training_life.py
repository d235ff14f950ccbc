"""A life of bytes in the Training service: a job of a base model, its checkpoints, and the adapter that is made."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from hashlib import sha256
from typing import Any

from tests.data.byte_site import PARENT, Site
from tests.training.crew import Crew
from tests.work.collected import collect_later, digests_of, purge_later
from tests.work.keepers import MemoryKeeper

from luthier.errors import NotFound
from luthier.storage.deleted import is_kept
from luthier.stored.v1.training_pb2 import ModelPrivate
from luthier.training import schema
from luthier.training.assembly import PURGED
from luthier.training.jobs.handler import TrainHandler
from luthier.training.jobs.planning import SplitLengths
from luthier.training.jobs.service import JobService, Outside
from luthier.training.models import repository
from luthier.training.models.service import ModelService
from luthier.v1.dataset_pb2 import SPLIT_TRAIN
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob
from luthier.v1.model_pb2 import Model, ModelFile
from luthier.v1.rendering_pb2 import LengthStatistics, Rendering, RenderingSplitStatistics
from luthier.v1.training_service_pb2 import CreateFineTuningJobRequest
from luthier.work.elsewhere import Elsewhere
from luthier.work.keeping import Keeping
from luthier.work.rewards import RewardAddresses
from luthier.work.tasks import TaskKind
from luthier.work.webhooks.targets import Targets
from luthier.worker.v1 import task_pb2

BASE, TUNED = f"{PARENT}/models/base", f"{PARENT}/models/j"
JOB = f"{PARENT}/fineTuningJobs/j"
RENDERING = f"{PARENT}/renderings/r"
TOKENIZER = "t" * 64
NUM_STEPS = 3
LAST = (b"{}", b"state %d" % NUM_STEPS)
"""What the last checkpoint holds, and the tuned model."""


class OneRendering:
    """The Data service, of which a job reads one rendering."""

    async def get(self, name: str) -> Rendering:
        lengths = LengthStatistics(count=4, sum=16, maximum=4)
        return Rendering(
            name=name,
            uid="uid of the rendering",
            state=Rendering.STATE_READY,
            digest="r" * 64,
            tokenizer_digest=TOKENIZER,
            split_statistics=[
                RenderingSplitStatistics(split=SPLIT_TRAIN, tokens=lengths, supervised_tokens=lengths)
            ],
        )

    async def lengths(self, name: str) -> SplitLengths:
        raise AssertionError("no row is looked at before a worker does")

    async def place(self, name: str, row: int) -> str:
        raise AssertionError("no row is wrong")


async def training_life(site: Site) -> None:
    """A base model is there; a job keeps its last checkpoint and ends with a tuned model; and all goes again."""
    models = ModelService(site.database, site.log, site.queue, site.blobs, Keeping())
    elsewhere = Elsewhere(site.database, {"renderings": MemoryKeeper()})
    outside = Outside(
        renderings=OneRendering(),
        elsewhere=elsewhere,
        rewards=RewardAddresses([]),
        webhooks=Targets([]),
        workers=Crew(),
    )
    jobs = JobService(site.database, site.log, site.queue, models, outside, site.blobs, Keeping())
    handler = TrainHandler(jobs.family, site.log, models, site.blobs, jobs.rollouts)
    site.queue.register(TaskKind.TRAIN, handler)
    await site.queue.recover()
    await collect_later(site.database, site.blobs)
    if not site.is_past("trained"):
        await add_base(site)
        await train(site, jobs)
        site.note("trained")
    with suppress(NotFound):
        await models.family.delete(TUNED, "")
    with suppress(NotFound):
        await jobs.delete(JOB, "")
    await collect_later(site.database, site.blobs)
    if await site.count(schema.fine_tuning_jobs, is_kept(schema.fine_tuning_jobs)):
        assert {sha256(data).hexdigest() for data in LAST} <= await digests_of(site.blobs), (
            "the job may come back"
        )
    with suppress(NotFound):
        await models.family.delete(BASE, "")
    await purge_later(site.database, PURGED)
    await elsewhere.sweep()


async def add_base(site: Site) -> None:
    """Have a base model that was registered."""
    rows = repository.models()
    async with site.database.reading() as connection:
        if await rows.find(connection, BASE) is not None:
            return
    blobs = {
        name: await site.blobs.put_bytes(name.encode()) for name in ("model.safetensors", "tokenizer.json")
    }
    private = ModelPrivate(
        files=[
            ModelFile(
                path=path,
                sha256=blob.digest,
                size_bytes=blob.size_bytes,
                tokenizer=path == "tokenizer.json",
            )
            for path, blob in blobs.items()
        ]
    )
    message = Model(
        name=BASE,
        state=Model.STATE_READY,
        kind=Model.KIND_BASE,
        digest="d" * 64,
        tokenizer_digest=TOKENIZER,
        architecture="LlamaForCausalLM",
        context_length=64,
    )
    async with site.database.transaction() as connection:
        await rows.insert(connection, message, private)


async def train(site: Site, jobs: JobService) -> None:
    """Bring the job to its end from wherever it is."""
    try:
        state = (await jobs.family.read(JOB)).message.state
    except NotFound:
        wanted = FineTuningJob(base_model=BASE, rendering=RENDERING, max_checkpoints=1)
        request = CreateFineTuningJobRequest(parent=PARENT, fine_tuning_job_id="j", fine_tuning_job=wanted)
        state = (await jobs.create(request)).state
    if state == FineTuningJob.STATE_SUCCEEDED:
        return
    task = await site.claim(TaskKind.TRAIN)
    of_task: dict[str, Any] = {"task": task.task, "epoch": task.epoch}
    base = {file.sha256 for file in task.train.base_model_files}
    for digest in base | {file.sha256 for file in task.train.checkpoint_files}:
        assert await site.blobs.has(digest), "what is gone on from is there"
    for step in range(task.train.checkpoint_step + 1, NUM_STEPS + 1):
        files = await brought(site, task, step)
        await site.call("CommitCheckpoint", **of_task, step=step, files=files)
        await collect_later(site.database, site.blobs)
        found = await digests_of(site.blobs)
        assert found == base | {file.sha256 for file in files}, (
            "the last one's files are there, and no others"
        )
    # The bytes of the last checkpoint become the model's, in one transaction.
    result = task_pb2.TaskResult(
        train=task_pb2.TrainResult(files=await brought(site, task, NUM_STEPS), step=NUM_STEPS)
    )
    await site.call("FinishTask", **of_task, result=result)
    async with site.database.reading() as connection:
        tuned = await repository.models().get(connection, TUNED)
    for file in tuned.private.files:
        assert await site.blobs.has(file.sha256), "the tuned model is whole"


async def brought(site: Site, task: task_pb2.Task, step: int) -> Sequence[task_pb2.BlobFile]:
    """Send an adapter as it is after a step: of every step its settings are the same."""
    return [
        await site.send(task, LAST[0], "adapter_config.json"),
        await site.send(task, b"state %d" % step, "adapter_model.safetensors"),
    ]
