"""RENDER tasks: fetch records and tokenizer, render in a limited process, store the shards."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc

from luthier.data.renderings.convert import (
    error_policy_from_proto,
    length_policy_from_proto,
    mask_mode_from_proto,
    outcome_to_proto,
)
from luthier.data.renderings.domain import RenderingOutcome
from luthier.data.shards import Shard
from luthier.data.worker.build_task import store_shards
from luthier.data.worker.render_child import Begun, converter
from luthier.data.worker.rendering import RenderedVersion, RenderPlan
from luthier.errors import DataLoss, Internal, InvalidArgument, Reason, Unavailable
from luthier.text.tokenizer import BUNDLE_FILES, TOKENIZER_FILE, bundle_digest
from luthier.work.context import TaskContext, TaskFailed
from luthier.work.limited import LimitedProcess, LimitReached, ProcessBroken, ProcessKilled
from luthier.work.limited_child import Limits
from luthier.work.model_files import fetch_model
from luthier.work.peers import channel
from luthier.worker.v1 import task_pb2

_REPORT_SECONDS = 0.5
_CHILD = "luthier.data.worker.render_child"


def renderer(training_address: str, limits: Limits) -> Callable[[TaskContext], task_pb2.TaskResult]:
    """Return the runner of RENDER tasks; tokenizers come from the ModelService at `training_address`."""

    def render(context: TaskContext) -> task_pb2.TaskResult:
        spec = context.task.render
        folder = context.scratch / "model"
        with channel(training_address) as models:
            bundle = _fetch_bundle(context, models, folder)
        plan = _plan(context, spec, bundle)
        total = sum(shard.num_rows for shard in spec.shards)
        rendered = _run(context, plan, limits, total)
        if rendered.failure is not None:
            raise TaskFailed(rendered.failure.to_error(), outcome_to_proto(_outcome(rendered, (), "")))
        shards = store_shards(context, rendered.shards)
        tokenizer = context.store(bundle / TOKENIZER_FILE, TOKENIZER_FILE)
        context.progress("rendering", total, total, "records")
        return outcome_to_proto(_outcome(rendered, shards, tokenizer.sha256), tokenizer)

    return render


def _outcome(rendered: RenderedVersion, shards: tuple[Shard, ...], tokenizer_blob: str) -> RenderingOutcome:
    return RenderingOutcome(
        shards=shards,
        split_statistics=rendered.splits,
        unsupervised_records=rendered.unsupervised,
        warnings=rendered.warnings,
        digest=rendered.digest,
        tokenizer_blob=tokenizer_blob,
        errors=rendered.errors,
        num_errors=rendered.num_errors,
        findings=rendered.findings,
        effective_template=rendered.effective_template,
        prefix_token_ids=rendered.prefix_token_ids,
        stop_token_ids=rendered.stop_token_ids,
    )


def _fetch_bundle(context: TaskContext, models: grpc.Channel, folder: Path) -> Path:
    spec = context.task.render
    folder.mkdir()
    fetch_model(
        models,
        lambda: context.token,
        spec.model.name,
        context.cache,
        folder,
        context.check,
        tokenizer_only=True,
    )
    files = {name: (folder / name).read_bytes() for name in BUNDLE_FILES if (folder / name).exists()}
    digest = bundle_digest(files)
    if digest != spec.tokenizer_digest:
        raise DataLoss(
            f"the tokenizer of {spec.model.name} must have digest {spec.tokenizer_digest}, got {digest}",
            reason=Reason.CHECKSUM_MISMATCH,
            metadata={"expected": spec.tokenizer_digest, "actual": digest},
        )
    return folder


def _plan(context: TaskContext, spec: task_pb2.RenderSpec, bundle: Path) -> RenderPlan:
    output = context.scratch / "rows"
    output.mkdir()
    return RenderPlan(
        shards=tuple(str(context.fetch(shard.file)) for shard in spec.shards),
        bundle_folder=str(bundle),
        output_folder=str(output),
        dataset_digest=spec.dataset_digest,
        tokenizer_digest=spec.tokenizer_digest,
        chat_template=spec.chat_template,
        mask_mode=mask_mode_from_proto(spec.mask_mode, "mask_mode"),
        max_tokens=spec.max_tokens,
        length_policy=length_policy_from_proto(spec.length_policy, "length_policy"),
        template_date=spec.template_date,
        split_turns=spec.split_turns,
        template_error_policy=error_policy_from_proto(spec.template_error_policy, "template_error_policy"),
    )


def _run(context: TaskContext, plan: RenderPlan, limits: Limits, total: int) -> RenderedVersion:
    """Render in a limited process; relay its progress, and end it when nobody wants the work any more."""
    at = Begun()
    next_report = 0.0

    def begun(note: Mapping[str, Any]) -> None:
        nonlocal at, next_report
        at = Begun(**note)
        if time.monotonic() >= next_report:
            context.check()
            context.progress("rendering", at.done, total, "records")
            next_report = time.monotonic() + _REPORT_SECONDS

    with closing(LimitedProcess(_CHILD, limits, context.scratch)) as process:
        try:
            request = converter().unstructure(plan)
            result = process.call(request, check=context.check, heard=begun)
        except LimitReached as error:
            raise InvalidArgument(
                f"rendering takes more than {error} at {at.filename}:{at.line}; "
                "pass a chat_template without unbounded loops",
                reason=Reason.TEMPLATE_INVALID,
                metadata=at.metadata,
            ) from error
        except ProcessKilled as error:
            raise Unavailable(
                "the rendering process was killed from outside", reason=Reason.WORKER_LOST
            ) from error
        except ProcessBroken as error:
            raise Internal(
                f"the rendering process failed at {at.filename}:{at.line}: {error}", metadata=at.metadata
            ) from error
    return converter().structure(result, RenderedVersion)
