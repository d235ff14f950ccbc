"""Evaluations, and text from a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from luthier.client import names
from luthier.client.async_driver import AsyncResource, async_method, async_stream_method
from luthier.client.events import Since, WaitOptions, wait, watch
from luthier.client.flows import Flow, ResumedStream, Scope, StreamFlow, call, pages, replaced
from luthier.client.graders import name_reward_models
from luthier.client.retry import is_retryable
from luthier.client.sync_driver import SyncResource, list_method, method, stream_method
from luthier.errors import DataLoss, LuthierError
from luthier.v1 import evaluation_service_pb2 as api
from luthier.v1.chat_pb2 import ChatMessage, Conversation
from luthier.v1.evaluation_pb2 import Evaluation, Prediction
from luthier.v1.grader_pb2 import Grader, Sample, SampleGrade
from luthier.v1.text_score_pb2 import TextToScore
from luthier.v1.webhook_pb2 import WebhookDelivery

if TYPE_CHECKING:
    from collections.abc import Callable

    from luthier.v1.event_pb2 import Event

_SAMPLES_A_CALL = 256
_BYTES_A_CALL = 3 << 20


def create(scope: Scope, evaluation: Evaluation, *, evaluation_id: str = "") -> Flow[Evaluation]:
    """Start an evaluation. Follow it with `watch` or `wait`.

    `evaluation` names `dataset_version` and in its `arms`, `judges` and `graders` the models (short names will do).
    """
    resolved = replaced(evaluation, dataset_version=names.version(scope.project, evaluation.dataset_version))
    if resolved.drift.dataset_version:
        resolved.drift.dataset_version = names.version(scope.project, resolved.drift.dataset_version)
    if resolved.reward_model:
        resolved.reward_model = names.weights(scope.project, resolved.reward_model)
    for arm in resolved.arms:
        arm.model = names.weights(scope.project, arm.model)
    for judge in resolved.judges:
        if judge.model:
            judge.model = names.weights(scope.project, judge.model)
    for grader in resolved.graders:
        name_reward_models(scope.project, grader)
    request = api.CreateEvaluationRequest(
        parent=names.project(scope.project), evaluation=resolved, evaluation_id=evaluation_id
    )
    return call(scope, lambda stubs: stubs.evaluation.CreateEvaluation, request)


def get(scope: Scope, name: str) -> Flow[Evaluation]:
    """Read one evaluation."""
    request = api.GetEvaluationRequest(name=_name(scope, name))
    return call(scope, lambda stubs: stubs.evaluation.GetEvaluation, request)


def list_all(
    scope: Scope,
    *,
    filter: str = "",  # noqa: A002 - the name on the wire
    order_by: str = "",
    page_size: int = 0,
    show_deleted: bool = False,
) -> StreamFlow[Evaluation]:
    """Go through the evaluations of the project, newest first; `show_deleted`: what is deleted and not purged too."""
    request = api.ListEvaluationsRequest(
        parent=names.project(scope.project),
        filter=filter,
        order_by=order_by,
        page_size=page_size,
        show_deleted=show_deleted,
    )
    return pages(
        scope, lambda stubs: stubs.evaluation.ListEvaluations, request, lambda page: page.evaluations
    )


def cancel(scope: Scope, name: str, *, etag: str = "") -> Flow[Evaluation]:
    """Ask an evaluation to stop. One that has ended is returned unchanged."""
    request = api.CancelEvaluationRequest(name=_name(scope, name), etag=etag)
    return call(scope, lambda stubs: stubs.evaluation.CancelEvaluation, request)


def delete(scope: Scope, name: str, *, etag: str = "") -> Flow[Evaluation]:
    """Delete an evaluation that has ended, with its predictions."""
    request = api.DeleteEvaluationRequest(name=_name(scope, name), etag=etag)
    return call(scope, lambda stubs: stubs.evaluation.DeleteEvaluation, request)


def undelete(scope: Scope, name: str, *, uid: str = "", etag: str = "") -> Flow[Evaluation]:
    """Bring back an evaluation that was deleted, until it is purged; `uid`: which of several that had the name."""
    request = api.UndeleteEvaluationRequest(name=_name(scope, name), uid=uid, etag=etag)
    return call(scope, lambda stubs: stubs.evaluation.UndeleteEvaluation, request)


def purge(scope: Scope, name: str, *, uid: str = "", etag: str = "") -> Flow[Evaluation]:
    """Purge an evaluation that was deleted, at once and for good; `uid` as in `undelete`."""
    request = api.PurgeEvaluationRequest(name=_name(scope, name), uid=uid, etag=etag)
    return call(scope, lambda stubs: stubs.evaluation.PurgeEvaluation, request)


def watch_events(scope: Scope, name: str, *, start_sequence: int = 0, uid: str = "") -> StreamFlow[Event]:
    """Follow an evaluation's events, each once and in order, until its final state.

    `uid` is that of the resource whose number `start_sequence` is, where another process saw it.
    """
    full = _name(scope, name)
    return watch(
        scope,
        (lambda stubs: stubs.evaluation.WatchEvaluation, api.WatchEvaluationRequest(name=full)),
        (lambda stubs: stubs.evaluation.GetEvaluation, api.GetEvaluationRequest(name=full)),
        Since(start_sequence=start_sequence, uid=uid),
    )


def wait_until_done(
    scope: Scope,
    name: str,
    *,
    timeout_seconds: float | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> Flow[Evaluation]:
    """Return the evaluation once it SUCCEEDED.

    Raise `EvaluationFailed` otherwise, DeadlineExceeded when time runs out.
    """
    full = _name(scope, name)
    return wait(
        scope,
        (lambda stubs: stubs.evaluation.WatchEvaluation, api.WatchEvaluationRequest(name=full)),
        (lambda stubs: stubs.evaluation.GetEvaluation, api.GetEvaluationRequest(name=full)),
        WaitOptions(timeout_seconds=timeout_seconds, on_event=on_event),
    )


def list_predictions(scope: Scope, name: str, *, page_size: int = 0) -> StreamFlow[Prediction]:
    """Go through every arm's answers, record by record."""
    request = api.ListPredictionsRequest(parent=_name(scope, name), page_size=page_size)
    return pages(
        scope, lambda stubs: stubs.evaluation.ListPredictions, request, lambda page: page.predictions
    )


def list_deliveries(scope: Scope, name: str, *, page_size: int = 0) -> StreamFlow[WebhookDelivery]:
    """Go through what became of telling an evaluation's webhooks that it has ended; nothing while it has not."""
    request = api.ListEvaluationDeliveriesRequest(parent=_name(scope, name), page_size=page_size)
    return pages(
        scope, lambda stubs: stubs.evaluation.ListEvaluationDeliveries, request, lambda page: page.deliveries
    )


def grade_samples(scope: Scope, grader: Grader, samples: Iterable[Sample]) -> StreamFlow[SampleGrade]:
    """Try a grader on given answers; nothing is stored. Yield a grade for each of them, in their order.

    What cannot be graded is an `error` of its grade, which then has no score. Any number of samples: they are sent in
    calls of some hundred, the next one when the grades of the one before are used up. Reward models may have short
    names.
    """
    named = replaced(grader)
    name_reward_models(scope.project, named)
    return _grade(scope, named, samples)


async def _grade(scope: Scope, grader: Grader, samples: Iterable[Sample]) -> StreamFlow[SampleGrade]:
    for batch in _batches(samples):
        for grade in await _graded(scope, grader, batch):
            yield grade


async def _graded(scope: Scope, grader: Grader, batch: list[Sample]) -> list[SampleGrade]:
    grades: list[SampleGrade] = []

    def request() -> api.GradeSamplesRequest:
        left = batch[len(grades) :]
        return api.GradeSamplesRequest(parent=names.project(scope.project), grader=grader, samples=left)

    stream = ResumedStream(scope, lambda stubs: stubs.evaluation.GradeSamples, request)
    try:
        while (num_left := len(batch) - len(grades)) > 0:
            response = await stream.receive()
            if response is None or not 0 < len(response.grades) <= num_left:
                raise DataLoss(f"the service did not grade {num_left} of {len(batch)} samples")
            grades += response.grades
    finally:
        stream.close()
    return grades


def _batches(samples: Iterable[Sample]) -> Iterator[list[Sample]]:
    batch: list[Sample] = []
    size_bytes = 0
    for sample in samples:
        one_bytes = sample.ByteSize()
        if batch and (len(batch) == _SAMPLES_A_CALL or size_bytes + one_bytes > _BYTES_A_CALL):
            yield batch
            batch, size_bytes = [], 0
        batch.append(sample)
        size_bytes += one_bytes
    if batch:
        yield batch


def generate(
    scope: Scope,
    model: str | api.GenerateTextRequest,
    prompt: str | Iterable[ChatMessage] | None = None,
    *,
    max_new_tokens: int = 0,
    temperature: float = 0.0,
    top_p: float = 0.0,
    seed: int = 0,
) -> StreamFlow[api.GenerateTextResponse]:
    """Stream an answer piece by piece; closing the stream stops the generation.

    A string is continued as it is; chat messages go through the model's chat template. A temperature of 0 is
    greedy, other zeros mean the service's defaults. In place of the model a whole request may be given; what is said
    beside it wins. The call is made again only while nothing has come.
    """
    request = api.GenerateTextRequest()
    request.CopyFrom(
        model if isinstance(model, api.GenerateTextRequest) else api.GenerateTextRequest(model=model)
    )
    request.model = names.askable(scope.project, request.model)
    beside = api.GenerateTextRequest(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    request.MergeFrom(beside)
    if isinstance(prompt, str):
        request.prompt = prompt
    elif prompt is not None:
        request.conversation.CopyFrom(Conversation(messages=prompt))
    return _generate(scope, request)


async def _generate(scope: Scope, request: api.GenerateTextRequest) -> StreamFlow[api.GenerateTextResponse]:
    backoff = scope.backoff()
    while True:
        stream = await scope.open(lambda stubs: stubs.evaluation.GenerateText, request)
        has_begun = False
        try:
            while (piece := await stream.receive()) is not None:
                has_begun = True
                yield piece
            return
        except LuthierError as error:
            if has_begun or not is_retryable(error):
                raise
            delay = backoff.delay_after(error)
        finally:
            stream.cancel()
        await scope.driver.sleep(delay)


def score_texts(
    scope: Scope, model: str | api.ScoreTextsRequest, texts: Iterable[TextToScore] = ()
) -> Flow[api.ScoreTextsResponse]:
    """Find how likely a model is to go on with given texts, at most 64 a call; no chat template stands beside them.

    In place of the model a whole request may be given, whose texts come before those given beside it.
    """
    request = api.ScoreTextsRequest()
    request.CopyFrom(
        model if isinstance(model, api.ScoreTextsRequest) else api.ScoreTextsRequest(model=model)
    )
    request.model = names.askable(scope.project, request.model)
    request.texts.extend(texts)
    return call(scope, lambda stubs: stubs.evaluation.ScoreTexts, request)


def _name(scope: Scope, name: str) -> str:
    return names.child(scope.project, "evaluations", name)


class Evaluations(SyncResource):
    """Evaluations."""

    create = method(create)
    get = method(get)
    list = list_method(list_all)
    cancel = method(cancel)
    delete = method(delete)
    undelete = method(undelete)
    purge = method(purge)
    watch = stream_method(watch_events)
    wait = method(wait_until_done)
    predictions = list_method(list_predictions)
    deliveries = list_method(list_deliveries)
    grade = stream_method(grade_samples)
    score_texts = method(score_texts)


class AsyncEvaluations(AsyncResource):
    """Evaluations."""

    create = async_method(create)
    get = async_method(get)
    list = async_stream_method(list_all)
    cancel = async_method(cancel)
    delete = async_method(delete)
    undelete = async_method(undelete)
    purge = async_method(purge)
    watch = async_stream_method(watch_events)
    wait = async_method(wait_until_done)
    predictions = async_stream_method(list_predictions)
    deliveries = async_stream_method(list_deliveries)
    grade = async_stream_method(grade_samples)
    score_texts = async_method(score_texts)
