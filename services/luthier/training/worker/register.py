"""Run REGISTER_MODEL tasks: a source becomes the files of a base model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

from luthier.errors import FailedPrecondition, NotFound, Reason, Unavailable
from luthier.lm.sources import (
    TOKENIZER_FILES,
    DirectorySource,
    GgufSource,
    HubSource,
    RegisteredFiles,
    Source,
)
from luthier.runtime.digests import contents_digest, files_digest
from luthier.training.worker.order import RegisterOrder
from luthier.training.worker.sources import resolve_allowed
from luthier.v1 import model_pb2
from luthier.work.children import Children
from luthier.work.context import TaskContext
from luthier.work.text_pool import Bundle, TextPool, TextRefused
from luthier.worker.v1 import task_pb2

Register = Callable[[RegisterOrder, TaskContext], RegisteredFiles]
"""Does what `register_source` does with an order, for as long as a task's context wants it."""


def register_here(order: RegisterOrder, context: TaskContext) -> RegisteredFiles:
    """Register in this very process, which must not train at the same time."""
    from luthier.lm.register import register_source

    context.check()
    return register_source(order.source, order.directory, scratch=order.scratch)


def register_in(children: Children) -> Register:
    """Return what registers in a process of its own, one of `children`.

    transformers changes torch's default type while it loads a model, for the whole process; and a read of a pipe that
    nobody writes to can only be ended with its process.
    """

    def register(order: RegisterOrder, context: TaskContext) -> RegisteredFiles:
        made: RegisteredFiles = children.run(order, {}, context)
        return made

    return register


def run_register(
    context: TaskContext, register: Register = register_here, roots: Sequence[Path] = ()
) -> task_pb2.TaskResult:
    """Read the source, write the model's files, store them; a folder or a file must lie below one of the roots.

    Raises:
        FailedPrecondition: BASE_MODEL_MISSING; the source is not there, or the Hub did not deliver it.
        InvalidArgument: PATH_NOT_ALLOWED, UNSAFE_MODEL_FILE or MODEL_INVALID.
        Unavailable: STALLED or CRASHED; the registration hung, or its process ended. Or the disk of a folder or a file
            does not answer just now.
    """
    spec = context.task.register_model
    context.progress("reading", 0, 0, "files")
    folder = context.scratch / "model"
    try:
        order = RegisterOrder(source=_source(spec, roots), directory=folder, scratch=context.scratch)
        registered = register(order, context)
    except (NotFound, Unavailable) as error:
        if error.reason in {Reason.STALLED, Reason.CRASHED, Reason.SHUTTING_DOWN}:
            raise
        if isinstance(error, Unavailable) and spec.WhichOneof("source") != "hub":
            raise
        raise FailedPrecondition(
            f"the source of {context.task.subject} must be readable: {error.message}",
            reason=Reason.BASE_MODEL_MISSING,
            metadata={"model": context.task.subject},
        ) from error
    files = []
    for number, (name, path) in enumerate(registered.files):
        context.check()
        context.progress("storing", number, len(registered.files), "files")
        stored = context.store(path, name)
        files.append(
            model_pb2.ModelFile(
                path=name,
                sha256=stored.sha256,
                size_bytes=stored.size_bytes,
                tokenizer=name in TOKENIZER_FILES,
            )
        )
    endings, warnings = _turn_endings(folder, context.check) if registered.has_chat_template else ((), ())
    result = task_pb2.RegisterModelResult(
        files=files,
        architecture=registered.architecture,
        num_parameters=registered.num_parameters,
        context_length=registered.context_length,
        has_chat_template=registered.has_chat_template,
        tokenizer_digest=files_digest({file.path: file.sha256 for file in files if file.tokenizer}),
        hub_commit=registered.hub_commit,
        eos_token_ids=sorted({*registered.eos_token_ids, *registered.end_of_turn_token_ids, *endings}),
        warnings=(*registered.warnings, *warnings),
    )
    for warning in result.warnings:
        context.log(warning, "WARNING")
    return task_pb2.TaskResult(register_model=result)


def _turn_endings(folder: Path, check: Callable[[], None]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return the tokens that the model's own template ends turns with, and what is not known of them.

    The template runs in a limited process, as it does whenever the model is asked.
    """
    files = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
    asked = {
        "chat_template": "",
        "template_date": datetime.now(UTC).date().isoformat(),
        "prefix_token_ids": None,
    }
    request = {"do": "describe", "messages": [], "tools": [], "asked": asked}
    with closing(TextPool()) as pool:
        try:
            answer = pool.ask(Bundle(key=contents_digest(files), read=lambda: files), request, check=check)
        except TextRefused as error:
            return (), (_unknown_ending(error.message),)
    known = tuple(answer["stop_token_ids"])
    return known, (_unknown_ending(answer["unknown_ending"]),) if answer["unknown_ending"] else ()


def _unknown_ending(why: str) -> str:
    return (
        "how the chat template ends a turn could not be found, so eos_token_ids may lack that token: in a conversation "
        f"made up for it, {why}"
    )


def _source(spec: task_pb2.RegisterModelSpec, roots: Sequence[Path]) -> Source:
    match spec.WhichOneof("source"):
        case "hub":
            return HubSource(repo_id=spec.hub.repo_id, revision=spec.hub.revision)
        case "directory":
            path = resolve_allowed(spec.directory, roots, field="model.directory", folder=True)
            return DirectorySource(path=path)
        case _:
            path = resolve_allowed(spec.gguf_path, roots, field="model.gguf_path", folder=False)
            return GgufSource(path=path)
