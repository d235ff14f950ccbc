"""Run MERGE and EXPORT tasks: files of a model, and of an adapter, become those of another model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from statistics import fmean

from luthier.errors import Reason, ResourceExhausted
from luthier.lm.apart import Apart, here
from luthier.lm.made import GgufType, HeldOutRow, Made
from luthier.training.recipe_settings import precision_of
from luthier.training.worker.order import MakeOrder
from luthier.v1 import model_pb2
from luthier.v1.fine_tuning_job_pb2 import HeldOutScores
from luthier.work.children import Children
from luthier.work.context import TaskContext
from luthier.worker.v1 import task_pb2

Make = Callable[[MakeOrder, TaskContext], Made]
"""Does what `make_here` does with an order, for as long as a task's context wants it."""
_FORMS: dict[int, GgufType] = {
    model_pb2.EXPORT_FORMAT_GGUF_F16: "F16",
    model_pb2.EXPORT_FORMAT_GGUF_Q8_0: "Q8_0",
}


def make_here(order: MakeOrder, check: Callable[[], None], apart: Apart = here) -> Made:
    """Merge or export in this very process, on the processor; `check` as the functions of `luthier.lm` call it.

    `apart` runs what reads tokenizers.

    Raises:
        InvalidArgument: MODEL_INVALID or EXPORT_NOT_POSSIBLE.
        FailedPrecondition: WEIGHTS_DIFFER.
        ResourceExhausted: OUT_OF_MEMORY.
    """
    from luthier.lm.exporting import ExportSource, export_files
    from luthier.lm.failures import is_for_memory
    from luthier.lm.merging import merge_files

    try:
        if order.form is None:
            assert order.adapter is not None, "what is merged is an adapter"
            return merge_files(
                order.model, order.adapter, order.directory, check, order.held_out, order.precision, apart
            )
        source = ExportSource(
            model=order.model,
            adapter=order.adapter,
            form=order.form,
            title=order.title,
            held_out=order.held_out,
            precision=order.precision,
            stop_token_ids=order.stop_token_ids,
        )
        return export_files(source, order.directory, check, apart)
    except (MemoryError, RuntimeError) as error:
        if is_for_memory(error):
            raise ResourceExhausted(str(error), reason=Reason.OUT_OF_MEMORY) from error
        raise


def make_in(children: Children) -> Make:
    """Return what merges and exports in a process of its own, one of `children`."""

    def make(order: MakeOrder, context: TaskContext) -> Made:
        made: Made = children.run(order, {}, context)
        return made

    return make


def run_merge(context: TaskContext, make: Make) -> task_pb2.TaskResult:
    """Add an adapter to its base, compare, and store the weights.

    Raises:
        InvalidArgument: MODEL_INVALID; the files cannot be used.
        FailedPrecondition: WEIGHTS_DIFFER; the result computes something else than the adapter.
        ResourceExhausted: OUT_OF_MEMORY.
        Unavailable: STALLED or CRASHED, the process that computed.
    """
    spec = context.task.merge
    plain = _order(context, spec.base_model_files, spec.adapter_files, spec.held_out)
    order = replace(plain, precision=precision_of(spec.base_precision))
    made = _made(context, make, order, spec.base_model_files)
    # The configuration is the base's own, byte for byte.
    config = [_blob(file) for file in spec.base_model_files if file.path == "config.json"]
    result = task_pb2.MergeResult(
        files=[*config, *_stored(context, made)], check=_check(made, spec), warnings=made.warnings
    )
    return task_pb2.TaskResult(merge=result)


def run_export(context: TaskContext, make: Make) -> task_pb2.TaskResult:
    """Write a model in another form, read it again, compare, and store the file.

    Raises as `run_merge`, and InvalidArgument EXPORT_NOT_POSSIBLE.
    """
    spec = context.task.export
    plain = _order(context, spec.model_files, spec.adapter_files, spec.held_out)
    precision = precision_of(spec.base_precision)
    order = replace(
        plain,
        form=_FORMS[spec.format],
        title=spec.title,
        precision=precision,
        stop_token_ids=tuple(spec.stop_token_ids),
    )
    made = _made(context, make, order, spec.model_files)
    result = task_pb2.ExportResult(
        files=_stored(context, made), check=_check(made, spec), warnings=made.warnings
    )
    return task_pb2.TaskResult(export=result)


def _order(
    context: TaskContext,
    model_files: Sequence[model_pb2.ModelFile],
    adapter_files: Sequence[task_pb2.BlobFile],
    held_out: HeldOutScores,
) -> MakeOrder:
    """Fetch the files, and return what is to be done with them."""
    wanted = [(context.scratch / "model", _blob(file)) for file in model_files]
    wanted += [(context.scratch / "adapter", file) for file in adapter_files]
    for number, (folder, file) in enumerate(wanted):
        context.check()
        context.progress("reading", number, len(wanted), "files")
        context.fetch_into(folder, file)
    return MakeOrder(
        model=context.scratch / "model",
        adapter=context.scratch / "adapter" if adapter_files else None,
        form=None,
        title="",
        directory=context.scratch / "made",
        scratch=context.scratch,
        held_out=tuple(
            HeldOutRow(token_ids=tuple(row.token_ids), positions=tuple(row.positions))
            for row in held_out.rows
        ),
    )


def _made(
    context: TaskContext, make: Make, order: MakeOrder, model_files: Sequence[model_pb2.ModelFile]
) -> Made:
    context.progress("computing", 0, 0, "weights")
    try:
        made = make(order, context)
    except ResourceExhausted as error:
        if error.reason != Reason.OUT_OF_MEMORY:
            raise
        size = sum(file.size_bytes for file in model_files)
        raise ResourceExhausted(
            f"{context.task.subject} must fit in the worker's memory: files of {size} bytes take some "
            f"{(2 if order.form is None else 4) * size} while they are compared; {error.message}",
            reason=Reason.OUT_OF_MEMORY,
            metadata={"size_bytes": str(size)},
        ) from error
    for warning in made.warnings:
        context.log(warning, "WARNING")
    return made


def _stored(context: TaskContext, made: Made) -> list[task_pb2.BlobFile]:
    files = []
    for number, (name, path) in enumerate(made.files):
        context.check()
        context.progress("storing", number, len(made.files), "files")
        files.append(context.store(path, name))
    return files


def _check(made: Made, spec: task_pb2.MergeSpec | task_pb2.ExportSpec) -> model_pb2.WeightsCheck:
    check = model_pb2.WeightsCheck(**asdict(made.check), base_precision=spec.base_precision)
    trained = [value for row in spec.held_out.rows for value in row.trainer_logprobs]
    if trained:
        pairs = zip(trained, made.check.held_out_logprobs, strict=True)
        check.held_out_difference = fmean(abs(one - other) for one, other in pairs)
    return check


def _blob(file: model_pb2.ModelFile) -> task_pb2.BlobFile:
    return task_pb2.BlobFile(path=file.path, sha256=file.sha256, size_bytes=file.size_bytes)
