"""Page tokens of what a job and a model have: none leads to another one that has the name by now."""

from __future__ import annotations

from typing import Any

import pytest
from tests.training.conftest import stored
from tests.work.checkpoints import checkpoint_of

from luthier.errors import InvalidArgument, NotFound, Reason
from luthier.runtime.paging import PageTokens
from luthier.training.jobs.servicer import TrainingServicer
from luthier.training.models.servicer import ModelServicer
from luthier.v1.event_pb2 import Event, MetricValues
from luthier.v1.model_service_pb2 import DownloadModelFileRequest, ListModelFilesRequest
from luthier.v1.training_service_pb2 import (
    ListCheckpointsRequest,
    ListFineTuningJobEventsRequest,
    ReadFineTuningJobMetricsRequest,
)
from luthier.work.tasks import Outcome

JOB = "projects/default/fineTuningJobs/one"
TOKENS = PageTokens(b"k" * 16)


async def ended_with_pages(bench: Any) -> None:
    """Have a job with two of everything that is listed by pages, CANCELLED."""
    await bench.create("one")
    task, _ = await bench.claim()
    for step in (1, 2):
        event = Event(step=step, metrics=MetricValues(values={"train_loss": 1.0}))
        await bench.queue.report(task.task_id, task.epoch, [(step, event)], None)
        file = await stored(bench, f"step {step}")
        await bench.queue.commit_checkpoint(checkpoint_of(task, step, [file]))
    await bench.cancel(JOB)
    await bench.queue.finish(task.task_id, task.epoch, Outcome(cancelled=True))


@pytest.mark.parametrize(
    ("method", "request_of"),
    [
        ("ListFineTuningJobEvents", ListFineTuningJobEventsRequest(parent=JOB, page_size=1)),
        ("ReadFineTuningJobMetrics", ReadFineTuningJobMetricsRequest(name=JOB, page_size=1)),
        ("ListCheckpoints", ListCheckpointsRequest(parent=JOB, page_size=1)),
    ],
)
async def test_a_token_of_a_deleted_job_is_refused_for_the_new_one_of_its_name(
    bench: Any, method: str, request_of: Any
) -> None:
    call = getattr(TrainingServicer(bench.jobs, TOKENS), method)
    await ended_with_pages(bench)
    request_of.page_token = (await call(request_of, None)).next_page_token
    assert request_of.page_token
    await call(request_of, None)
    await bench.jobs.family.delete(JOB, "")
    with pytest.raises(NotFound, match=f"{JOB} does not exist"):
        await call(request_of, None)
    await ended_with_pages(bench)
    with pytest.raises(InvalidArgument) as caught:
        await call(request_of, None)
    assert caught.value.reason == Reason.PAGE_TOKEN_INVALID
    request_of.page_token = ""
    assert (await call(request_of, None)).next_page_token


async def test_a_download_does_not_go_on_in_another_model_of_the_name(bench: Any) -> None:
    download = ModelServicer(bench.models, bench.making, bench.checkpoints, TOKENS).DownloadModelFile
    context: Any = None
    uid = (await bench.model(bench.MODEL)).uid
    request = DownloadModelFileRequest(name=bench.MODEL, path="tokenizer.json", start_offset=3, uid=uid)
    assert b"".join([piece.data async for piece in download(request, context)]) == b"enizer"
    await bench.models.family.delete(bench.MODEL, "")
    await bench.add_model()
    with pytest.raises(NotFound, match=f"{bench.MODEL} must have uid {uid}") as caught:
        await anext(aiter(download(request, context)))
    assert caught.value.reason == Reason.RESOURCE_REPLACED
    request.uid = ""
    assert [piece.offset async for piece in download(request, context)] == [3]


async def test_a_token_of_a_deleted_models_files_is_refused_for_the_new_one_of_its_name(bench: Any) -> None:
    list_files = ModelServicer(bench.models, bench.making, bench.checkpoints, TOKENS).ListModelFiles
    request: Any = ListModelFilesRequest(parent=bench.MODEL, page_size=1)
    context: Any = None
    first = await list_files(request, context)
    request.page_token = first.next_page_token
    second = await list_files(request, context)
    assert [file.path for page in (first, second) for file in page.files] == [
        "model.safetensors",
        "tokenizer.json",
    ]
    assert not second.next_page_token
    await bench.models.family.delete(bench.MODEL, "")
    await bench.add_model()
    with pytest.raises(InvalidArgument) as caught:
        await list_files(request, context)
    assert caught.value.reason == Reason.PAGE_TOKEN_INVALID
