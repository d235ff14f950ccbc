"""RENDER tasks: fetch records and tokenizer, render in a limited process, store the shards."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc

from luthier.data.worker.build_task import store_shards
from luthier.data.worker.limited_renderer import LimitedRenderer
from luthier.data.worker.record_rendering import RecordSettings
from luthier.data.worker.version_rendering import RenderedVersion, RenderOrder, render_version
from luthier.errors import DataLoss, Internal, InvalidArgument, Reason, Unavailable
from luthier.runtime.digests import contents_digest
from luthier.storage.disk import disk_full, is_full
from luthier.text.tokenizer import BUNDLE_FILES, TOKENIZER_FILE
from luthier.v1.rendering_pb2 import LengthPolicy, MaskMode, RenderingKind
from luthier.work.context import TaskContext, TaskFailed
from luthier.work.limited import LimitReached, ProcessBroken, ProcessKilled
from luthier.work.limited_child import Limits
from luthier.work.model_files import fetch_model
from luthier.work.peers import channel
from luthier.worker.v1 import task_pb2

_REPORT_SECONDS = 0.5


def renderer(training_address: str, limits: Limits) -> Callable[[TaskContext], task_pb2.TaskResult]:
    """Return the runner of RENDER tasks; tokenizers come from the ModelService at `training_address`."""

    def render(context: TaskContext) -> task_pb2.TaskResult:
        spec = context.task.render
        folder = context.scratch / "model"
        with channel(training_address) as models:
            bundle = _fetch_bundle(context, models, folder)
        order = _order(context, spec, bundle)
        total = sum(shard.num_rows for shard in spec.shards)
        rendered = _run(context, order, limits, total)
        result = task_pb2.TaskResult(render=rendered.result)
        if rendered.failure is not None:
            raise TaskFailed(rendered.failure.to_error(), result)
        result.render.shards.extend(store_shards(context, rendered.shards))
        result.render.tokenizer.CopyFrom(context.store(bundle / TOKENIZER_FILE, TOKENIZER_FILE))
        context.progress("rendering", total, total, "records")
        return result

    return render


def _fetch_bundle(context: TaskContext, models: grpc.Channel, folder: Path) -> Path:
    spec = context.task.render
    folder.mkdir()
    fetch_model(
        models,
        lambda: context.token,
        spec.model,
        context.cache,
        folder,
        context.check,
        tokenizer_only=True,
    )
    files = {name: (folder / name).read_bytes() for name in BUNDLE_FILES if (folder / name).exists()}
    digest = contents_digest(files)
    if digest != spec.tokenizer_digest:
        raise DataLoss(
            f"the tokenizer of {spec.model.name} must have digest {spec.tokenizer_digest}, got {digest}",
            reason=Reason.CHECKSUM_MISMATCH,
            metadata={"expected": spec.tokenizer_digest, "actual": digest},
        )
    return folder


def _order(context: TaskContext, spec: task_pb2.RenderSpec, bundle: Path) -> RenderOrder:
    output = context.scratch / "rows"
    output.mkdir()
    mask_mode = MaskMode.Name(spec.mask_mode).removeprefix("MASK_MODE_") if spec.mask_mode else ""
    return RenderOrder(
        spec=spec,
        shards=tuple(str(context.fetch(shard.file)) for shard in spec.shards),
        output_folder=str(output),
        records=RecordSettings(
            bundle_folder=str(bundle),
            chat_template=spec.chat_template,
            mask_mode=mask_mode,
            max_tokens=spec.max_tokens,
            length_policy=LengthPolicy.Name(spec.length_policy).removeprefix("LENGTH_POLICY_"),
            template_date=spec.template_date,
            split_turns=spec.split_turns,
            # A service of before there were kinds names none.
            kind=RenderingKind.Name(spec.kind).removeprefix("RENDERING_KIND_") if spec.kind else "SUPERVISED",
        ),
    )


def _run(context: TaskContext, order: RenderOrder, limits: Limits, total: int) -> RenderedVersion:
    """Render in a limited process; tell how far it is, and end it when nobody wants the work any more."""
    place = {"filename": "", "line": "0"}
    next_report = 0.0

    def begin(done: int, row: Mapping[str, Any]) -> None:
        nonlocal place, next_report
        place = {"filename": row["filename"], "line": str(row["line"])}
        if time.monotonic() >= next_report:
            context.check()
            context.progress("rendering", done, total, "records")
            next_report = time.monotonic() + _REPORT_SECONDS

    with closing(LimitedRenderer(order.records, limits, context.scratch, context.check)) as renderer:
        try:
            return render_version(order, renderer, begin)
        except LimitReached as error:  # before a record, or another one follows
            raise InvalidArgument(
                f"the model's tokenizer and the chat template take more than {error} to be read",
                reason=Reason.MODEL_INVALID,
            ) from error
        except ProcessKilled as error:
            raise Unavailable(
                "the rendering process was killed from outside", reason=Reason.WORKER_LOST
            ) from error
        except ProcessBroken as error:
            raise Internal(
                f"the rendering process failed at {place['filename']}:{place['line']}: {error}",
                metadata=place,
            ) from error
        except OSError as error:
            if not is_full(error):
                raise
            raise disk_full(str(error)) from error
