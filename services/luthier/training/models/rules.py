"""What models may be: sources, files, and which state follows which."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from luthier.errors import FieldViolation, InvalidArgument, Reason
from luthier.runtime.digests import files_digest
from luthier.runtime.field_limits import (
    ANY,
    DIGEST,
    REQUIRED,
    LimitTable,
    count,
    demanded,
    limit_violations,
    matching,
    refuse,
    under,
)
from luthier.runtime.labels import DISPLAY_NAME, label_violations
from luthier.runtime.result_limits import FILE, TEXT, TOKEN_IDS, WARNINGS
from luthier.v1.model_pb2 import Model, ModelFile
from luthier.worker.v1.task_pb2 import BlobFile, RegisterModelResult

_TEMPLATE_PATH = "chat_template.jinja"
"""Where a tokenizer bundle, and a tuned model's download, keep the chat template."""
_REPO_ID = matching(re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?"), "like HuggingFaceTB/SmolLM2-135M-Instruct")
_REVISION = matching(re.compile(r"[\w./-]{0,200}"), "a commit, tag or branch")
_ADAPTER_FILES = frozenset({"adapter_config.json", "adapter_model.safetensors"})
_WEIGHTS_FILES = frozenset({"config.json", "model.safetensors"})
"""What a job brings of its model: of one on a base model, and of one that has all its weights."""
MAX_FILES = 1000

LIMITS: LimitTable = {
    "display_name": DISPLAY_NAME,
    "hub.repo_id": demanded(_REPO_ID),
    "hub.revision": _REVISION,
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

State = Model.State
TRANSITIONS: Mapping[int, Sequence[int]] = {
    State.STATE_QUEUED: (State.STATE_REGISTERING, State.STATE_FAILED, State.STATE_CANCELLED),
    State.STATE_REGISTERING: (
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
    if model.kind == Model.KIND_ADAPTER:
        description = (
            f"must be a model with all its weights, got {model.name!r}, an adapter on {model.base_model}; "
            "start_from goes on with it"
        )
        raise InvalidArgument.of_fields(FieldViolation(field=field, description=description))


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
        files[_TEMPLATE_PATH] = ModelFile(
            path=_TEMPLATE_PATH, sha256=sha256, size_bytes=len(data), tokenizer=True
        )
    return list(files.values())


def tuned_files(
    wanted: Model, bundle: Sequence[ModelFile], base_files: Sequence[ModelFile], tuned: Sequence[BlobFile]
) -> list[ModelFile]:
    """Return the files of a tuned model, in order of paths.

    What else is in a checkpoint is left out. One with all its weights has what its base has besides weights, such as
    `generation_config.json`. Raises InvalidArgument MODEL_INVALID where a worker brought the files of another kind.
    """
    brought, own = {file.path for file in tuned}, _ADAPTER_FILES if wanted.base_model else _WEIGHTS_FILES
    if missing := own - brought:
        raise InvalidArgument(
            f"the result must have {', '.join(sorted(missing))}, got {', '.join(sorted(brought)) or 'no file'}",
            reason=Reason.MODEL_INVALID,
        )
    files = {file.path: file for file in bundle}
    if not wanted.base_model:
        files |= {file.path: file for file in base_files if not (file.tokenizer or _holds_weights(file.path))}
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
    filled.has_chat_template = any(file.path == _TEMPLATE_PATH and file.tokenizer for file in files)
    if not wanted.base_model:
        filled.tokenizer_digest = _digest(file for file in files if file.tokenizer)
        filled.architecture = base.architecture
        if wanted.kind == Model.KIND_REWARD:
            filled.architecture = base.architecture.replace("ForCausalLM", "ForSequenceClassification")
        filled.num_parameters = base.num_parameters
        filled.context_length = base.context_length
        filled.eos_token_ids.extend(base.eos_token_ids)
    return filled


def _holds_weights(path: str) -> bool:
    return path.endswith((".safetensors", ".safetensors.index.json"))


def _digest(files: Iterable[ModelFile]) -> str:
    return files_digest({file.path: file.sha256 for file in files})


def _source_violations(model: Model) -> Iterator[FieldViolation]:
    if model.WhichOneof("source") is None:
        description = "must be one of hub, directory and gguf_path, got none"
        yield FieldViolation(field="model.source", description=description, reason=Reason.FIELD_REQUIRED)
