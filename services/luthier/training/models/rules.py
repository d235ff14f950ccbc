"""What models may be: sources, files, and which state follows which."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from luthier.errors import FieldViolation, InvalidArgument, Reason
from luthier.lm.made import EXPORTABLE
from luthier.runtime.digests import files_digest
from luthier.runtime.field_limits import (
    ANY,
    DIGEST,
    REQUIRED,
    Limit,
    LimitTable,
    count,
    demanded,
    limit_violations,
    matching,
    num_bytes,
    refuse,
    under,
)
from luthier.runtime.labels import DISPLAY_NAME, label_violations
from luthier.runtime.result_limits import FILE, TEXT, TOKEN_IDS, WARNINGS
from luthier.v1.model_pb2 import (
    EXPORT_FORMAT_UNSPECIFIED,
    ExportFormat,
    Model,
    ModelFile,
    WeightsCheck,
)
from luthier.v1.model_service_pb2 import ExportModelRequest, MergeModelRequest
from luthier.v1.reference_pb2 import Reference
from luthier.worker.v1.task_pb2 import BlobFile, RegisterModelResult

TEMPLATE_PATH = "chat_template.jinja"
"""Where a tokenizer bundle, and a tuned model's download, keep the chat template."""
_REPO_ID = matching(re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?"), "like HuggingFaceTB/SmolLM2-135M-Instruct")
_REVISION = matching(re.compile(r"[\w./-]{0,200}"), "a commit, tag or branch")
_ADAPTER_FILES = frozenset({"adapter_config.json", "adapter_model.safetensors"})
_WEIGHTS_FILES = frozenset({"config.json", "model.safetensors"})
"""What a job brings of its model: of one on a base model, and of one that has all its weights."""
MAX_FILES = 1000

MAX_PATH_BYTES = 4096
"""The longest path that Linux takes."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_PATH = (
    Limit(rule="must have no control characters", allows=lambda path: _CONTROL.search(path) is None),
    Limit(rule="must be an absolute path", allows=lambda path: path.startswith("/")),
    Limit(rule="must have no part '..'", allows=lambda path: ".." not in path.split("/")),
    num_bytes(MAX_PATH_BYTES),
)
"""What a path must be on whatever machine it is read; where it may lie, the worker there looks."""

LIMITS: LimitTable = {
    "display_name": DISPLAY_NAME,
    "hub.repo_id": demanded(_REPO_ID),
    "hub.revision": _REVISION,
    "directory": _PATH,
    "gguf_path": _PATH,
}
RESULT_LIMITS: LimitTable = {
    "files": count(MAX_FILES, "files", least=1),
    **under("files[]", FILE),
    "files[].tokenizer": ANY,
    "architecture": (REQUIRED, TEXT),
    "num_parameters": ANY,
    "context_length": ANY,
    "has_chat_template": ANY,
    "tokenizer_digest": demanded(DIGEST),
    "hub_commit": _REVISION,
    "eos_token_ids": TOKEN_IDS,
    **WARNINGS,
}
"""What a worker may say of a base model that it took in."""

_CHECK: LimitTable = {f"check.{field.name}": ANY for field in WeightsCheck.DESCRIPTOR.fields}
MAKING_RESULT_LIMITS: LimitTable = {
    "files": count(MAX_FILES, "files", least=1),
    **under("files[]", FILE),
    "check": REQUIRED,
    **_CHECK,
    **WARNINGS,
}
"""What a worker may say of weights that it merged, or of a model that it wrote in another form."""
MAKING_LIMITS: LimitTable = {"display_name": DISPLAY_NAME}
"""What a caller may say of a model that is to be made from another one."""

State = Model.State
TRANSITIONS: Mapping[int, Sequence[int]] = {
    State.STATE_QUEUED: (
        State.STATE_REGISTERING,
        State.STATE_MAKING,
        State.STATE_FAILED,
        State.STATE_CANCELLED,
    ),
    State.STATE_REGISTERING: (
        State.STATE_QUEUED,
        State.STATE_READY,
        State.STATE_FAILED,
        State.STATE_CANCELLING,
        State.STATE_CANCELLED,
    ),
    State.STATE_MAKING: (
        State.STATE_QUEUED,
        State.STATE_READY,
        State.STATE_FAILED,
        State.STATE_CANCELLING,
        State.STATE_CANCELLED,
    ),
    # A worker may end its work, or fail, before it hears that it should stop.
    State.STATE_CANCELLING: (State.STATE_CANCELLED, State.STATE_READY, State.STATE_FAILED),
    State.STATE_READY: (),
    State.STATE_FAILED: (),
    State.STATE_CANCELLED: (),
}


def check_model(model: Model) -> None:
    """Raise InvalidArgument that names every field of a new base model that is not valid by itself."""
    refuse(
        [
            *limit_violations(model, LIMITS, "model"),
            *label_violations(model.labels, "model.labels"),
            *_source_violations(model),
        ]
    )


def resolved(model: Model) -> Model:
    """Return a new base model with every default filled in, QUEUED."""
    filled = Model()
    filled.CopyFrom(model)
    filled.state = State.STATE_QUEUED
    filled.kind = Model.KIND_BASE
    if filled.HasField("hub"):
        filled.hub.revision = model.hub.revision or "main"
    return filled


def require_base(model: Model, field: str) -> None:
    """Raise InvalidArgument unless jobs can build on a model of this kind; `field` is where it was named."""
    if model.kind == Model.KIND_REWARD:
        description = f"must be a model of words, got {model.name!r}, a reward model"
        raise InvalidArgument.of_fields(FieldViolation(field=field, description=description))
    refuse_export(model, field)
    if model.kind == Model.KIND_ADAPTER:
        description = (
            f"must be a model with all its weights, got {model.name!r}, an adapter on {model.base_model}; "
            "start_from goes on with it"
        )
        raise InvalidArgument.of_fields(FieldViolation(field=field, description=description))


def refuse_export(model: Model, field: str) -> None:
    """Raise InvalidArgument for a model that is a file for other programs; `field` is where it was named."""
    if model.kind == Model.KIND_EXPORT:
        description = (
            f"must be no export, got {model.name!r}, which is a file for other programs; it was made from "
        )
        violation = FieldViolation(field=field, description=f"{description}{model.start_from}")
        raise InvalidArgument.of_fields(violation)


def registered_files(result: RegisterModelResult) -> list[ModelFile]:
    """Return what a registration brought, in order of paths.

    Raises InvalidArgument MODEL_INVALID: no weights or no tokenizer, or the bundle has another digest than the
    worker says.
    """
    files = sorted(result.files, key=lambda file: file.path)
    if not {file.tokenizer for file in files} >= {True, False}:
        raise InvalidArgument(
            f"a base model must have weights and a tokenizer, got {[file.path for file in files]}",
            reason=Reason.MODEL_INVALID,
        )
    tokenizer_digest = _digest(file for file in files if file.tokenizer)
    if tokenizer_digest != result.tokenizer_digest:
        raise InvalidArgument(
            f"tokenizer_digest must be {tokenizer_digest}, got {result.tokenizer_digest!r}",
            reason=Reason.MODEL_INVALID,
        )
    return files


def registered(model: Model, result: RegisterModelResult) -> Model:
    """Return a base model with what its registration found."""
    filled = Model()
    filled.CopyFrom(model)
    if filled.HasField("hub") and result.hub_commit:
        filled.hub.revision = result.hub_commit
    filled.digest = _digest(result.files)
    filled.tokenizer_digest = result.tokenizer_digest
    filled.architecture = result.architecture
    filled.num_parameters = result.num_parameters
    filled.context_length = result.context_length
    filled.has_chat_template = result.has_chat_template
    filled.eos_token_ids.extend(result.eos_token_ids)
    filled.warnings.extend(result.warnings)
    return filled


def taught_bundle(
    wanted: Model, base: Model, base_files: Sequence[ModelFile], *, keeps_template: bool = False
) -> list[ModelFile]:
    """Return the files that whoever downloads a tuned model needs to ask it as it was taught.

    They are the files of its base model's tokenizer, the template that was taught in place of their own, unless
    `keeps_template`: one with dates written in would be another tokenizer bundle than the base's. Where it does not say
    how it was taught, or where the tokenizer is another one, an adapter has none.
    """
    taught = wanted.taught
    files = {file.path: file for file in base_files if file.tokenizer}
    if not wanted.HasField("taught") or base.tokenizer_digest != taught.tokenizer_digest:
        return [] if wanted.base_model else list(files.values())
    if taught.chat_template and not keeps_template:
        data = taught.chat_template.encode()
        sha256 = hashlib.sha256(data).hexdigest()
        files[TEMPLATE_PATH] = ModelFile(
            path=TEMPLATE_PATH, sha256=sha256, size_bytes=len(data), tokenizer=True
        )
    return list(files.values())


def tuned_files(
    wanted: Model, asking: Sequence[ModelFile], base_files: Sequence[ModelFile], tuned: Sequence[BlobFile]
) -> list[ModelFile]:
    """Return the files of a tuned model, in order of paths.

    `asking` are those by which it is asked as it was taught. What else is in a checkpoint is left out. One with all its
    weights has what else its base has besides weights. Raises InvalidArgument MODEL_INVALID where a worker brought the
    files of another kind.
    """
    brought, own = {file.path for file in tuned}, _ADAPTER_FILES if wanted.base_model else _WEIGHTS_FILES
    if missing := own - brought:
        raise InvalidArgument(
            f"the result must have {', '.join(sorted(missing))}, got {', '.join(sorted(brought)) or 'no file'}",
            reason=Reason.MODEL_INVALID,
        )
    files: dict[str, ModelFile] = {}
    if not wanted.base_model:
        files |= {file.path: file for file in base_files if not (file.tokenizer or _holds_weights(file.path))}
    files |= {file.path: file for file in asking}
    for file in tuned:
        if file.path in own:
            files[file.path] = ModelFile(path=file.path, sha256=file.sha256, size_bytes=file.size_bytes)
    return [files[path] for path in sorted(files)]


def tuned(wanted: Model, base: Model, files: Sequence[ModelFile]) -> Model:
    """Return a tuned model that has these files, READY; one with all its weights says what a base model says."""
    filled = Model()
    filled.CopyFrom(wanted)
    filled.state = State.STATE_READY
    filled.digest = _digest(files)
    filled.has_chat_template = any(file.path == TEMPLATE_PATH and file.tokenizer for file in files)
    if not wanted.base_model:
        filled.tokenizer_digest = _digest(file for file in files if file.tokenizer)
        filled.architecture = base.architecture
        if wanted.kind == Model.KIND_REWARD:
            filled.architecture = base.architecture.replace("ForCausalLM", "ForSequenceClassification")
        filled.num_parameters = base.num_parameters
        filled.context_length = base.context_length
        # None of an old base: then its files say all of them, and a few would hide the others.
        if base.eos_token_ids:
            filled.eos_token_ids.extend(sorted({*base.eos_token_ids, *wanted.taught.stop_token_ids}))
    return filled


def _holds_weights(path: str) -> bool:
    return path.endswith((".safetensors", ".safetensors.index.json"))


def _digest(files: Iterable[ModelFile]) -> str:
    return files_digest({file.path: file.sha256 for file in files})


def _source_violations(model: Model) -> Iterator[FieldViolation]:
    if model.WhichOneof("source") is None:
        description = "must be one of hub, directory and gguf_path, got none"
        yield FieldViolation(field="model.source", description=description, reason=Reason.FIELD_REQUIRED)


def merged_from(source: Model, request: MergeModelRequest) -> Model:
    """Return what merging an adapter will make, QUEUED, as far as that is known before.

    Raises:
        InvalidArgument: a field is wrong, or the source is no adapter of a model of words.
    """
    _check_making(request)
    if source.kind != Model.KIND_ADAPTER:
        kind = Model.Kind.Name(source.kind).removeprefix("KIND_")
        what = "has all its weights" if not source.base_model else "values answers"
        description = (
            f"must be an adapter of a model of words, got {source.name!r}, of kind {kind}: it {what}"
        )
        raise InvalidArgument.of_fields(FieldViolation(field="name", description=description))
    made = _made_from(source, request)
    made.kind = Model.KIND_WEIGHTS
    return made


def exported_from(source: Model, base: Model, request: ExportModelRequest) -> Model:
    """Return what exporting a model will make, QUEUED; `base` is the model that has all its weights.

    Raises:
        InvalidArgument: a field is wrong, it is no model of words, or EXPORT_NOT_POSSIBLE for its architecture.
    """
    _check_making(request)
    if request.format == EXPORT_FORMAT_UNSPECIFIED:
        known = ", ".join(name.removeprefix("EXPORT_FORMAT_") for name in ExportFormat.keys()[1:])
        violation = FieldViolation(
            field="format", description=f"must be one of {known}, got nothing", reason=Reason.FIELD_REQUIRED
        )
        raise InvalidArgument.of_fields(violation)
    refuse_export(source, "name")
    if source.kind == Model.KIND_REWARD:
        description = f"must be a model of words, got {source.name!r}, a reward model"
        raise InvalidArgument.of_fields(FieldViolation(field="name", description=description))
    if base.architecture not in EXPORTABLE:
        description = (
            f"must be a model of architecture {', '.join(EXPORTABLE)} for a GGUF file, got {source.name!r}, of "
            f"{base.architecture}; as safetensors every model can be downloaded"
        )
        raise InvalidArgument.of_fields(
            FieldViolation(field="name", description=description, reason=Reason.EXPORT_NOT_POSSIBLE)
        )
    made = _made_from(source, request)
    made.kind = Model.KIND_EXPORT
    made.export_format = request.format
    made.architecture = base.architecture
    made.num_parameters = base.num_parameters
    made.context_length = base.context_length
    return made


def adapter_files(files: Iterable[ModelFile]) -> list[BlobFile]:
    """Return those files of an adapter that say what it does: its weights, and the template that it was taught by."""
    return [
        BlobFile(path=file.path, sha256=file.sha256, size_bytes=file.size_bytes)
        for file in files
        if not file.tokenizer or file.path == TEMPLATE_PATH
    ]


def exported(
    model: Model, has_chat_template: bool, files: Sequence[BlobFile]
) -> tuple[Model, list[ModelFile]]:
    """Return an exported model that has these files, in order of paths, READY, and them."""
    kept = [
        ModelFile(path=file.path, sha256=file.sha256, size_bytes=file.size_bytes)
        for file in sorted(files, key=lambda file: file.path)
    ]
    filled = Model()
    filled.CopyFrom(model)
    filled.digest = _digest(kept)
    filled.has_chat_template = has_chat_template
    return filled, kept


def _check_making(request: MergeModelRequest | ExportModelRequest) -> None:
    refuse([*limit_violations(request, MAKING_LIMITS), *label_violations(request.labels, "labels")])


def _made_from(source: Model, request: MergeModelRequest | ExportModelRequest) -> Model:
    """Return a new model that is made of another one: what it says of its origin."""
    made = Model(
        display_name=request.display_name,
        labels=request.labels,
        state=State.STATE_QUEUED,
        start_from=source.name,
        fine_tuning_job=source.fine_tuning_job,
        step=source.step,
        taught=source.taught if source.HasField("taught") else None,
        references=[Reference(name=source.name, uid=source.uid, digest=source.digest)],
    )
    made.references.extend(one for one in source.references if one.name != source.name)
    return made
