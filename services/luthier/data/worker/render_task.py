"""RENDER tasks: fetch records and tokenizer, have them rendered, store the shards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import grpc

from luthier.data.worker.build_task import store_shards
from luthier.data.worker.record_rendering import RecordSettings
from luthier.data.worker.version_rendering import RenderedVersion, RenderOrder
from luthier.errors import DataLoss, Reason
from luthier.runtime.digests import contents_digest
from luthier.text.tokenizer import BUNDLE_FILES, TOKENIZER_FILE
from luthier.v1.rendering_pb2 import LengthPolicy, MaskMode, RenderingKind
from luthier.work.context import TaskContext, TaskFailed
from luthier.work.model_files import fetch_model
from luthier.work.peers import channel
from luthier.worker.v1 import task_pb2

Render = Callable[[RenderOrder, TaskContext], RenderedVersion]
"""Renders a version, for as long as a task's context wants it."""


def renderer(training_address: str, render: Render) -> Callable[[TaskContext], task_pb2.TaskResult]:
    """Return the runner of RENDER tasks; tokenizers come from the ModelService at `training_address`."""

    def render_version(context: TaskContext) -> task_pb2.TaskResult:
        spec = context.task.render
        folder = context.scratch / "model"
        with channel(training_address) as models:
            bundle = _fetch_bundle(context, models, folder)
        rendered = render(_order(context, spec, bundle), context)
        result = task_pb2.TaskResult(render=rendered.result)
        if rendered.failure is not None:
            raise TaskFailed(rendered.failure.to_error(), result)
        result.render.shards.extend(store_shards(context, rendered.shards))
        result.render.tokenizer.CopyFrom(context.store(bundle / TOKENIZER_FILE, TOKENIZER_FILE))
        total = sum(shard.num_rows for shard in spec.shards)
        context.progress("rendering", total, total, "records")
        return result

    return render_version


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
