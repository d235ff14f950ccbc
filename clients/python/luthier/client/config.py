"""What a client needs to know, and where it finds it: arguments, the environment, a profile, defaults."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path

from luthier.client.profiles import CONFIG_VARIABLE, PROFILE_VARIABLE, Profile, read_profiles
from luthier.client.retry import RetryPolicy
from luthier.errors import InvalidArgument, Reason, Unauthenticated

DEFAULT_HOME = "~/.local/share/luthier"
_PREFIX = "LUTHIER_CLIENT_"
_KEY_FILE = "api-key"
_KEY_VARIABLE = "LUTHIER_CLIENT_API_KEY"
_KEY = re.compile(r"[\x21-\x7e]*")
_CLIENT_VARIABLES = frozenset(
    {
        _KEY_VARIABLE,
        "LUTHIER_CLIENT_PROJECT",
        "LUTHIER_CLIENT_TIMEOUT_SECONDS",
        CONFIG_VARIABLE,
        PROFILE_VARIABLE,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig:
    """Everything that a client is told.

    Addresses are `host:port` of a loopback host, `unix:/path`, or `https://host:port`. `timeout_seconds`
    bounds one attempt of a unary call. `api_key` is a secret and never part of the representation.

    Raises:
        InvalidArgument: The key, which is not repeated, has characters that no header carries, e.g. the end of a line.
    """

    api_key: str = field(repr=False)
    project: str = "default"
    data_address: str = "127.0.0.1:7601"
    training_address: str = "127.0.0.1:7602"
    evaluation_address: str = "127.0.0.1:7603"
    timeout_seconds: float = 30.0
    retry: RetryPolicy = field(default_factory=RetryPolicy)

    def __post_init__(self) -> None:
        if not _KEY.fullmatch(self.api_key):
            raise InvalidArgument(
                "the API key must consist of visible ASCII characters, and has others, or spaces"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigArguments:
    """What the caller said itself; None means that the environment, a profile and then the default decides.

    A `profile` that is named here comes before the environment.
    """

    profile: str | None = None
    api_key: str | None = None
    project: str | None = None
    home: str | os.PathLike[str] | None = None
    data_address: str | None = None
    training_address: str | None = None
    evaluation_address: str | None = None
    timeout_seconds: float | None = None
    retry: RetryPolicy | None = None


def read_config(arguments: ConfigArguments, environ: Mapping[str, str] = os.environ) -> ClientConfig:
    """Return the configuration: arguments before `environ` before the user's profile before defaults.

    The profile is the one that LUTHIER_CLIENT_PROFILE names, or else the file's `default_profile`. One that the
    arguments name comes before `environ`: whoever says which installation means it whole.

    Raises:
        InvalidArgument: A `LUTHIER_CLIENT_*` name is unknown, a value does not fit, or the file of profiles is wrong.
        NotFound: There is no profile of the name.
        Unauthenticated: No API key was given and none lies in the home (CREDENTIALS_MISSING).
    """
    found = sources(arguments, environ)
    return found.config(found.key())


def sources(arguments: ConfigArguments, environ: Mapping[str, str]) -> Sources:
    """Return where `read_config` finds values. Raises as it does, but for the key."""
    _refuse_unknown(environ)
    profiles = read_profiles(environ)
    if arguments.profile is not None:
        name, by = arguments.profile, "--profile"
    elif environ.get(PROFILE_VARIABLE):
        name, by = environ[PROFILE_VARIABLE], PROFILE_VARIABLE
    else:
        name, by = profiles.default, "default_profile"
    is_named = arguments.profile is not None
    return Sources(
        arguments=arguments,
        profile=profiles.named(name) if name or is_named else Profile(),
        environ=environ,
        profile_name=name,
        profile_by=by,
        is_profile_first=is_named,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Where values come from, each in its order.

    Attributes:
        arguments: what the caller said.
        profile: what the profile of `profile_name` says, which `profile_by` names; an empty name: there is none.
        environ: what the environment says.
        is_profile_first: whether the profile comes before it.
    """

    arguments: ConfigArguments
    profile: Profile
    environ: Mapping[str, str]
    profile_name: str
    profile_by: str
    is_profile_first: bool

    def config(self, api_key: str) -> ClientConfig:
        """Return the configuration with a key. Raises InvalidArgument for a time, or a key, that is none."""
        defaults = ClientConfig(api_key="")
        return ClientConfig(
            api_key=api_key,
            project=self.text("project", "LUTHIER_CLIENT_PROJECT") or defaults.project,
            data_address=self.text("data_address", "LUTHIER_DATA_ADDRESS") or defaults.data_address,
            training_address=self.text("training_address", "LUTHIER_TRAINING_ADDRESS")
            or defaults.training_address,
            evaluation_address=self.text("evaluation_address", "LUTHIER_EVALUATION_ADDRESS")
            or defaults.evaluation_address,
            timeout_seconds=self.timeout() or defaults.timeout_seconds,
            retry=self.arguments.retry or defaults.retry,
        )

    def text(self, field: str, variable: str) -> str | None:
        """Return the first that says something of a field."""
        said, of_profile = getattr(self.arguments, field), getattr(self.profile, field)
        of_environ = self.environ.get(variable)
        return said or (of_profile or of_environ if self.is_profile_first else of_environ or of_profile)

    def key_place(self) -> Path | str:
        """Return where the API key is: a file, or the name of what says it."""
        if self.arguments.api_key:
            return "api_key"
        of_environ = self.environ.get(_KEY_VARIABLE)
        if self.arguments.home and not of_environ:
            return Path(self.arguments.home).expanduser() / _KEY_FILE
        own = self.profile.api_key_file or self.profile.home
        if of_environ and not (own and self.is_profile_first):
            return _KEY_VARIABLE
        if self.profile.api_key_file:
            return Path(self.profile.api_key_file).expanduser()
        return Path(self.text("home", "LUTHIER_HOME") or DEFAULT_HOME).expanduser() / _KEY_FILE

    def key(self) -> str:
        """Return the API key. Raises Unauthenticated when there is none."""
        place = self.key_place()
        if isinstance(place, Path):
            return _key_in(place)
        return self.arguments.api_key or self.environ[_KEY_VARIABLE]

    def timeout(self) -> float | None:
        """Return the seconds of an attempt. Raises InvalidArgument for what is no time."""
        said = self.arguments.timeout_seconds
        of_environ = self.environ.get("LUTHIER_CLIENT_TIMEOUT_SECONDS") or None
        of_profile = self.profile.timeout_seconds
        if said is None:
            order = (of_profile, of_environ) if self.is_profile_first else (of_environ, of_profile)
            value: float | str | None = next((one for one in order if one is not None), None)
        else:
            value = said
        return None if value is None else _seconds(value)


def _refuse_unknown(environ: Mapping[str, str]) -> None:
    unknown = sorted(name for name in environ if name.startswith(_PREFIX) and name not in _CLIENT_VARIABLES)
    if unknown:
        raise InvalidArgument(
            f"environment variable {unknown[0]} is not known;"
            f" the client reads {', '.join(sorted(_CLIENT_VARIABLES))}",
            metadata={"variable": unknown[0]},
        )


def environment() -> Mapping[str, str]:
    """Return the environment of this process, for what else of a client asks where things are."""
    return os.environ


def prepare_mlflow(environ: MutableMapping[str, str] = os.environ) -> None:
    """Have MLflow tell nobody what is written, and take file stores, unless the user has said so himself.

    Call it before it is imported. Since 3.7 it opens a store of files only for who insists.
    """
    environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")


def silence_grpc() -> None:
    """Keep gRPC's own log lines off stderr, unless the user asked for them. Call it before gRPC is imported.

    A command reports a lost connection itself; the line of gRPC's core would stand in the middle of its output.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def _key_in(path: Path) -> str:
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


def _seconds(value: float | str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise InvalidArgument(f"timeout_seconds must be a number of seconds above 0, got {value!r}")
    return seconds
