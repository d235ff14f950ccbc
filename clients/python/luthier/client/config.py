"""What a client needs to know, and where it finds it: arguments, then the environment, then defaults."""

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path

from luthier.client.retry import RetryPolicy
from luthier.errors import InvalidArgument, Reason, Unauthenticated

DEFAULT_HOME = "~/.local/share/luthier"
_PREFIX = "LUTHIER_CLIENT_"
_CLIENT_VARIABLES = frozenset(
    {"LUTHIER_CLIENT_API_KEY", "LUTHIER_CLIENT_PROJECT", "LUTHIER_CLIENT_TIMEOUT_SECONDS"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig:
    """Everything that a client is told.

    Addresses are `host:port` of a loopback host, `unix:/path`, or `https://host:port`. `timeout_seconds`
    bounds one attempt of a unary call. `api_key` is a secret and never part of the representation.
    """

    api_key: str = field(repr=False)
    project: str = "default"
    data_address: str = "127.0.0.1:7601"
    training_address: str = "127.0.0.1:7602"
    evaluation_address: str = "127.0.0.1:7603"
    timeout_seconds: float = 30.0
    retry: RetryPolicy = field(default_factory=RetryPolicy)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigArguments:
    """What the caller said itself; None means that the environment and then the default decides."""

    api_key: str | None = None
    project: str | None = None
    home: str | os.PathLike[str] | None = None
    data_address: str | None = None
    training_address: str | None = None
    evaluation_address: str | None = None
    timeout_seconds: float | None = None
    retry: RetryPolicy | None = None


def read_config(arguments: ConfigArguments, environ: Mapping[str, str] = os.environ) -> ClientConfig:
    """Return the configuration: arguments before `environ` before defaults.

    Raises:
        InvalidArgument: A `LUTHIER_CLIENT_*` name is unknown or a value does not fit.
        Unauthenticated: No API key was given and none lies in the home (CREDENTIALS_MISSING).
    """
    unknown = sorted(name for name in environ if name.startswith(_PREFIX) and name not in _CLIENT_VARIABLES)
    if unknown:
        raise InvalidArgument(
            f"environment variable {unknown[0]} is not known;"
            f" the client reads {', '.join(sorted(_CLIENT_VARIABLES))}",
            metadata={"variable": unknown[0]},
        )
    home = Path(arguments.home or environ.get("LUTHIER_HOME") or DEFAULT_HOME).expanduser()
    chosen = {
        name: said or environ.get(variable)
        for name, said, variable in (
            ("project", arguments.project, "LUTHIER_CLIENT_PROJECT"),
            ("data_address", arguments.data_address, "LUTHIER_DATA_ADDRESS"),
            ("training_address", arguments.training_address, "LUTHIER_TRAINING_ADDRESS"),
            ("evaluation_address", arguments.evaluation_address, "LUTHIER_EVALUATION_ADDRESS"),
        )
    }
    defaults = ClientConfig(api_key="")
    return ClientConfig(
        api_key=arguments.api_key or environ.get("LUTHIER_CLIENT_API_KEY") or _key_in_home(home),
        project=chosen["project"] or defaults.project,
        data_address=chosen["data_address"] or defaults.data_address,
        training_address=chosen["training_address"] or defaults.training_address,
        evaluation_address=chosen["evaluation_address"] or defaults.evaluation_address,
        timeout_seconds=_timeout(arguments.timeout_seconds, environ) or defaults.timeout_seconds,
        retry=arguments.retry or defaults.retry,
    )


def silence_grpc(environ: MutableMapping[str, str] = os.environ) -> None:
    """Keep gRPC's own log lines off stderr, unless the user asked for them. Call it before gRPC is imported.

    A command reports a lost connection itself; the line of gRPC's core would stand in the middle of its output.
    """
    environ.setdefault("GRPC_VERBOSITY", "NONE")


def _key_in_home(home: Path) -> str:
    path = home / "api-key"
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (FileNotFoundError, NotADirectoryError):
        key = ""
    except PermissionError as error:
        raise Unauthenticated(
            f"the API key file {path} cannot be read by this user: {error.strerror}",
            reason=Reason.CREDENTIALS_MISSING,
        ) from error
    if not key:
        raise Unauthenticated(
            "no API key: pass api_key, set LUTHIER_CLIENT_API_KEY, or point LUTHIER_HOME to the home of"
            f" `luthierd up` ({path} does not hold one)",
            reason=Reason.CREDENTIALS_MISSING,
            metadata={"path": str(path)},
        )
    return key


def _timeout(said: float | None, environ: Mapping[str, str]) -> float | None:
    text = environ.get("LUTHIER_CLIENT_TIMEOUT_SECONDS")
    if said is None and not text:
        return None
    try:
        seconds = float(text or "") if said is None else said
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise InvalidArgument(f"timeout_seconds must be a number of seconds above 0, got {said or text!r}")
    return seconds
