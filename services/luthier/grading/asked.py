"""Graders that ask somebody outside of this package: reward services and reward models, by their paths in a grader."""

from __future__ import annotations

from collections.abc import Iterator

from luthier.errors import FieldViolation, InvalidArgument, Reason
from luthier.v1.grader_pb2 import Grader, RemoteGrader, RewardModelGrader
from luthier.v1.model_pb2 import Model


def remote_graders(grader: Grader) -> Iterator[tuple[str, RemoteGrader]]:
    """Yield the graders that ask a reward service, by path: `` of the grader itself, `outer.inner` in multi graders."""
    return ((path, one.remote) for path, one in leaves(grader) if one.HasField("remote"))


def remote_addresses(grader: Grader, field: str) -> Iterator[tuple[str, str]]:
    """Yield the addresses that a grader asks, each after the field in which it stands; `field` is the grader's own.

    `grader.multi.graders['a'].remote.address` is one.
    """
    for path, remote in remote_graders(grader):
        yield f"{field_of(field, path)}.remote.address", remote.address


def reward_model_graders(grader: Grader) -> Iterator[tuple[str, RewardModelGrader]]:
    """Yield the graders that ask a reward model, by path as `remote_graders` does."""
    return ((path, one.reward_model) for path, one in leaves(grader) if one.HasField("reward_model"))


def reward_model_names(grader: Grader, field: str) -> Iterator[tuple[str, str]]:
    """Yield the reward models that a grader asks, each after its field, as `remote_addresses` does."""
    for path, one in reward_model_graders(grader):
        yield f"{field_of(field, path)}.reward_model.model", one.model


def require_reward_model(model: Model, field: str) -> None:
    """Raise InvalidArgument REWARD_MODEL_EXPECTED for a model of another kind; `field` names it."""
    if model.kind == Model.KIND_REWARD:
        return
    kind = Model.Kind.Name(model.kind).removeprefix("KIND_")
    raise InvalidArgument.of_fields(
        FieldViolation(
            field=field,
            description=f"must be a reward model (kind REWARD) or a checkpoint of one, got {model.name!r}, of kind "
            f"{kind}; a job of method reward_model makes one",
            reason=Reason.REWARD_MODEL_EXPECTED,
        )
    )


def leaves(grader: Grader, path: str = "") -> Iterator[tuple[str, Grader]]:
    """Yield the graders that look at an answer themselves, by path as `remote_graders` does."""
    if not grader.HasField("multi"):
        yield path, grader
        return
    for name, inner in sorted(grader.multi.graders.items()):
        yield from leaves(inner, below(path, name))


def field_of(field: str, path: str) -> str:
    """Return the field of the grader at a path within one whose own field is `field`."""
    return field + "".join(f".multi.graders[{name!r}]" for name in path.split(".") if name)


def below(path: str, name: str) -> str:
    """Return the path of a grader within the one at a path: `outer.inner`."""
    return f"{path}.{name}" if path else name
