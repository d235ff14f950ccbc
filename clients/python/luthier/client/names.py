"""Short names: what people type, made into resource names.

`my-data` is `projects/{project}/datasets/my-data`, `my-data/v1` is version `v1` of it. A name that starts
with `projects/` is taken as it is; whether it is well formed is for the service to say.
"""

from luthier.errors import FieldViolation, InvalidArgument


def project(name: str) -> str:
    """Return the resource name of a project."""
    return name if name.startswith("projects/") else f"projects/{name}"


def child(project_id: str, collection: str, name: str) -> str:
    """Return the name of a resource right below the project, e.g. of collection `datasets`."""
    return _resolve(project_id, (collection,), name)


def version(project_id: str, name: str) -> str:
    """Return the name of a dataset version from `dataset/version`."""
    return _resolve(project_id, ("datasets", "versions"), name)


def checkpoint(project_id: str, name: str) -> str:
    """Return the name of a checkpoint from `job/checkpoint`."""
    return _resolve(project_id, ("fineTuningJobs", "checkpoints"), name)


def weights(project_id: str, name: str) -> str:
    """Return the name of a model, or of a checkpoint from `job/checkpoint`."""
    return checkpoint(project_id, name) if "/" in name else child(project_id, "models", name)


def alias(project_id: str, name: str) -> str:
    """Return the name of an alias of a model; an `@` before a short name is left out."""
    return child(project_id, "modelAliases", name.removeprefix("@"))


def askable(project_id: str, name: str) -> str:
    """Return the name of what can be asked: as `weights`, or of an alias from `@alias`."""
    return alias(project_id, name) if name.startswith("@") else weights(project_id, name)


def short(name: str) -> str:
    """Return the short form of a resource name, the one that `child`, `version` and `checkpoint` take."""
    return "/".join(name.split("/")[3::2]) if name.startswith("projects/") else name


def _resolve(project_id: str, collections: tuple[str, ...], name: str) -> str:
    if name.startswith("projects/"):
        return name
    parts = name.split("/")
    if (
        len(parts) == 2 * len(collections) - 1
        and len(collections) > 1
        and parts[1::2] == list(collections[1:])
    ):
        parts = parts[0::2]
    if len(parts) != len(collections) or not all(parts):
        shape = "/".join(f"<{collection.rstrip('s')}>" for collection in collections)
        full = "/".join(f"{collection}/..." for collection in collections)
        description = f"must be {shape} or projects/.../{full}, got {name!r}"
        raise InvalidArgument.of_fields(FieldViolation(field="name", description=description))
    return "/".join((project(project_id), *(f"{c}/{p}" for c, p in zip(collections, parts, strict=True))))
