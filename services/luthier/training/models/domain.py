"""Models as values: base models and the adapters tuned on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum

from luthier.errors import FailedPrecondition, Failure, FieldViolation, InvalidArgument
from luthier.training.teaching import Taught


class ModelState(StrEnum):
    """Where a model stands; see the Model.State enum of the API."""

    QUEUED = "QUEUED"
    REGISTERING = "REGISTERING"
    READY = "READY"
    FAILED = "FAILED"


class ModelKind(StrEnum):
    """Base model or adapter."""

    BASE = "BASE"
    ADAPTER = "ADAPTER"


TRANSITIONS: Mapping[ModelState, frozenset[ModelState]] = {
    ModelState.QUEUED: frozenset({ModelState.REGISTERING, ModelState.FAILED}),
    ModelState.REGISTERING: frozenset({ModelState.QUEUED, ModelState.READY, ModelState.FAILED}),
    ModelState.READY: frozenset(),
    ModelState.FAILED: frozenset(),
}
"""Every legal change of state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSource:
    """A model on the Hugging Face Hub; empty revision: main."""

    repo_id: str
    revision: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectorySource:
    """A folder in transformers' layout."""

    directory: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufSource:
    """A GGUF file."""

    gguf_path: str


Source = HubSource | DirectorySource | GgufSource


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFile:
    """One file of a model; `tokenizer` says whether it belongs to the tokenizer bundle."""

    path: str
    sha256: str
    size_bytes: int
    tokenizer: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A set of weights; see the Model message of the API.

    Attributes:
        source: where a base model comes from; None for adapters.
        files: in order of paths; empty before READY.
        failure: why it failed; None unless FAILED.
        taught: how an adapter was taught; None for base models, and where it was not kept.
    """

    name: str
    uid: str
    state: ModelState
    labels: Mapping[str, str]
    create_time: datetime
    update_time: datetime
    revision: int
    kind: ModelKind
    display_name: str = ""
    source: HubSource | DirectorySource | GgufSource | None = None
    base_model: str = ""
    fine_tuning_job: str = ""
    step: int = 0
    digest: str = ""
    tokenizer_digest: str = ""
    architecture: str = ""
    num_parameters: int = 0
    context_length: int = 0
    has_chat_template: bool = False
    eos_token_ids: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()
    files: tuple[ModelFile, ...] = ()
    failure: Failure | None = None
    taught: Taught | None = None

    @property
    def etag(self) -> str:
        """The revision as HTTP writes entity tags."""
        return f'"{self.revision}"'

    @property
    def final(self) -> bool:
        """Whether the state never changes again."""
        return not TRANSITIONS[self.state]

    def moved(self, state: ModelState) -> Model:
        """Return the model in another state; an illegal change is a fault of the service."""
        assert state in TRANSITIONS[self.state], f"{self.name} cannot go from {self.state} to {state}"
        return replace(self, state=state)

    def require_ready(self) -> Model:
        """Return the model if it can be used. Raises FailedPrecondition WRONG_STATE."""
        if self.state is not ModelState.READY:
            why = f": {self.failure.message}" if self.failure else ""
            raise FailedPrecondition(
                f"{self.name} must be READY, it is {self.state}{why}",
                metadata={"name": self.name, "state": self.state},
            )
        return self

    def require_base(self, field: str) -> Model:
        """Return the model if jobs can build on it. Raises InvalidArgument, FailedPrecondition."""
        if self.kind is not ModelKind.BASE:
            description = f"must be a base model, got {self.name!r}, an adapter on {self.base_model}"
            raise InvalidArgument.of_fields(FieldViolation(field=field, description=description))
        return self.require_ready()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOutcome:
    """What a registration brought; see RegisterModelResult."""

    files: tuple[ModelFile, ...]
    digest: str
    tokenizer_digest: str
    architecture: str
    num_parameters: int
    context_length: int
    has_chat_template: bool
    hub_commit: str
    eos_token_ids: tuple[int, ...]
    warnings: tuple[str, ...]
