"""A life of bytes in the Evaluation service: answers that workers keep, predictions of shares, and of the whole."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from tests.data.byte_site import Site
from tests.evaluation.evaluations.memory_peers import BASE, PARENT, TUNED, VERSION, MemoryPeers
from tests.work.collected import collect_later, digests_of, purge_later
from tests.work.keepers import MemoryKeeper

from luthier.errors import NotFound
from luthier.evaluation import schema
from luthier.evaluation.access import Access
from luthier.evaluation.evaluations.dealing import ShareHandler
from luthier.evaluation.evaluations.service import EvaluationService, Outside
from luthier.evaluation.evaluations.servicer import EvaluateHandler
from luthier.evaluation.purged import PURGED
from luthier.storage.deleted import is_kept
from luthier.v1.evaluation_pb2 import TEMPLATE_SOURCE_BASE, ArmResult, Evaluation, EvaluationArm, Prediction
from luthier.v1.evaluation_service_pb2 import CreateEvaluationRequest
from luthier.work.elsewhere import Elsewhere
from luthier.work.judge_access import JudgeAccess
from luthier.work.keeping import Keeping
from luthier.work.rewards import RewardAddresses
from luthier.work.row_file import write_rows
from luthier.work.tasks import TaskKind
from luthier.work.webhooks.targets import Targets
from luthier.worker.v1 import task_pb2

EVALUATION = f"{PARENT}/evaluations/e"
NUM_RECORDS = 3
ARMS = ("zero", "tuned")


async def evaluation_life(site: Site) -> None:
    """An evaluation is dealt in two shares, of which answers and predictions are brought; it ends; and it goes."""
    keeper = MemoryKeeper()
    elsewhere = Elsewhere(site.database, {"versions": keeper, "models": keeper})
    outside = Outside(
        peers=MemoryPeers(),
        elsewhere=elsewhere,
        webhooks=Targets([]),
        access=Access(judges=JudgeAccess((), ()), rewards=RewardAddresses([])),
    )
    evaluations = EvaluationService(site.database, site.log, site.queue, site.blobs, outside, Keeping())
    site.queue.register(TaskKind.EVALUATE, EvaluateHandler(evaluations))
    site.queue.register(TaskKind.ANSWER_SHARE, ShareHandler(evaluations, site.blobs))
    await site.queue.recover()
    await collect_later(site.database, site.blobs)
    if not site.is_past("evaluated"):
        await evaluate(site, evaluations)
        site.note("evaluated")
    with suppress(NotFound):
        await evaluations.family.delete(EVALUATION, "")
    await collect_later(site.database, site.blobs)
    if await site.count(schema.evaluations, is_kept(schema.evaluations)):
        assert len(await digests_of(site.blobs)) == 1, (
            "its predictions may come back, its answers are forgotten"
        )
    await purge_later(site.database, PURGED)
    await elsewhere.sweep()


async def evaluate(site: Site, evaluations: EvaluationService) -> None:
    """Bring the evaluation to its end from wherever it is."""
    try:
        await evaluations.family.read(EVALUATION)
    except NotFound:
        arms = [
            EvaluationArm(arm_id=arm, model=model) for arm, model in zip(ARMS, (BASE, TUNED), strict=True)
        ]
        wanted = Evaluation(dataset_version=VERSION, arms=arms, max_workers=2)
        request = CreateEvaluationRequest(parent=PARENT, evaluation=wanted, evaluation_id="e")
        await evaluations.create(request)
    while (await evaluations.family.read(EVALUATION)).message.state != Evaluation.STATE_SUCCEEDED:
        task = await site.claim(TaskKind.ANSWER_SHARE, TaskKind.EVALUATE)
        if task.HasField("answer_share"):
            await answer(site, task)
        else:
            await conclude(site, task)


async def answer(site: Site, task: task_pb2.Task) -> None:
    """Answer what one share asks: keep some answers, then bring all of them."""
    of_task: dict[str, Any] = {"task": task.task, "epoch": task.epoch}
    [asked] = task.answer_share.share.rows
    for file in task.answer_share.checkpoint_files:
        assert await site.blobs.has(file.sha256), "what earlier attempts answered is there"
    answers = await site.send(task, f"answers of {asked.arm_id}".encode(), "answers")
    await site.call("CommitCheckpoint", **of_task, step=1, files=[answers])
    await collect_later(site.database, site.blobs)
    assert await site.blobs.has(answers.sha256), "the attempts after this one need them"
    file = await site.send(task, predicted(site, asked.arm_id), "predictions")
    result = task_pb2.AnswerShareResult(num_records=NUM_RECORDS, predictions=file)
    await site.call("FinishTask", **of_task, result=task_pb2.TaskResult(answer_share=result))
    await collect_later(site.database, site.blobs)
    assert await site.blobs.has(file.sha256), "the whole is made of its shares"


async def conclude(site: Site, task: task_pb2.Task) -> None:
    """Bring the outcome, with what the shares answered."""
    kept = task.evaluate.checkpoint_files
    assert len(kept) == len(ARMS), "each share kept some"
    for file in kept:
        assert await site.blobs.has(file.sha256), "what was answered is there"
    arms = [
        ArmResult(arm_id=arm, template_source=TEMPLATE_SOURCE_BASE, template_date="2026-11-30")
        for arm in ARMS
    ]
    file = await site.send(task, predicted(site, *ARMS), "predictions")
    result = task_pb2.EvaluateResult(arm_results=arms, num_records=NUM_RECORDS, predictions=file)
    outcome = task_pb2.TaskResult(evaluate=result)
    await site.call("FinishTask", task=task.task, epoch=task.epoch, result=outcome)


def predicted(site: Site, *arms: str) -> bytes:
    """What some arms answered to every record, as the bytes of a file."""
    rows = [Prediction(row=row, reference=f"r{row}") for row in range(NUM_RECORDS)]
    for row in rows:
        for arm in arms:
            row.answers.add(arm_id=arm, text=f"{arm} {row.row}")
    path = site.folder / "predictions"
    write_rows(path, (row.SerializeToString() for row in rows))
    return path.read_bytes()
