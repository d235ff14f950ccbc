"""RENDER tasks: fetch records and tokenizer, render in a child process, store the shards."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

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
from luthier.data.worker.render_child import Begun, Limits, Order, converter, too_much_memory
from luthier.data.worker.rendering import RenderedVersion, RenderPlan
from luthier.errors import DataLoss, Failure, Internal, InvalidArgument, LuthierError, Reason, Unavailable
from luthier.text.tokenizer import BUNDLE_FILES, TOKENIZER_FILE, bundle_digest
from luthier.work.context import TaskContext, TaskFailed
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
        rendered = _run(context, Order(plan=plan, limits=limits), total)
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
    )


def _fetch_bundle(context: TaskContext, models: grpc.Channel, folder: Path) -> Path:
    spec = context.task.render
    folder.mkdir()
    fetch_model(models, context.token, spec.model.name, context.cache, folder, tokenizer_only=True)
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


def _run(context: TaskContext, order: Order, total: int) -> RenderedVersion:
    """Render in a child process; relay its progress, and end it when nobody wants the work any more."""
    at = Begun(done=0, filename="", line=0)
    next_report = 0.0
    with _child(context.scratch) as child:
        assert child.stdin is not None, "it is a pipe"
        assert child.stdout is not None, "it is a pipe"
        child.stdin.write(json.dumps(converter().unstructure(order)))
        child.stdin.close()
        for line in child.stdout:
            message = json.loads(line)
            if "result" in message:
                return converter().structure(message["result"], RenderedVersion)
            if "failure" in message:
                raise Failure(**message["failure"]).to_error()
            at = Begun(**message["at"])
            if time.monotonic() >= next_report:
                context.check()
                context.progress("rendering", at.done, total, "records")
                next_report = time.monotonic() + _REPORT_SECONDS
        raise _ended(child.wait(), at, order.limits)


@contextmanager
def _child(folder: Path) -> Iterator[subprocess.Popen[str]]:
    # Nothing of our own environment: a template that got out of its sandbox would find no setting and no key.
    environment = {
        "PYTHONPATH": ":".join(path for path in sys.path if path),
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        # Other pools reserve more address space than they use, which the limit would count.
        "ARROW_DEFAULT_MEMORY_POOL": "system",
    }
    command = [sys.executable, "-P", "-m", _CHILD]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder, env=environment
    ) as child:
        try:
            yield child
        finally:
            child.kill()


def _ended(code: int, at: Begun, limits: Limits) -> LuthierError:
    """Return why a child ended without an answer."""
    place = {"filename": at.filename, "line": str(at.line)}
    if code == -signal.SIGXCPU:
        return InvalidArgument(
            f"rendering takes more than {limits.cpu_seconds} s of CPU time at "
            f"{at.filename}:{at.line}; pass a chat_template without unbounded loops",
            reason=Reason.TEMPLATE_INVALID,
            metadata=place,
        )
    if code == -signal.SIGKILL:
        return Unavailable("the rendering process was killed from outside", reason=Reason.WORKER_LOST)
    if code in (-signal.SIGABRT, -signal.SIGSEGV):
        # How native code ends when it gets no memory.
        return too_much_memory(at, limits)
    return Internal(
        f"the rendering process ended with code {code} at {at.filename}:{at.line}", metadata=place
    )
