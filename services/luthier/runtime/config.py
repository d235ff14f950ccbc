"""The configuration of a process: `LUTHIER_*` variables and one TOML file into a frozen dataclass, read once.

A field is set by `LUTHIER_<SECTION>_<FIELD>`, or by `LUTHIER_<FIELD>` where `SHARED` lists the field. The file that
`LUTHIER_CONFIG` names has the same names in lower case: shared ones at the top, the others in a table per section.
The environment wins. A name that nobody declares is refused: a misspelt setting must not be a setting ignored.
"""

import difflib
import os
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_type_hints

from luthier.errors import InvalidArgument

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

C = TypeVar("C", bound="DataclassInstance")

SHARED: Mapping[str, str] = MappingProxyType(
    {
        "HOME": "~/.local/share/luthier",
        "LOG_LEVEL": "INFO",
        "PROJECTS": "default",
        "DATA_ADDRESS": "127.0.0.1:7601",
        "TRAINING_ADDRESS": "127.0.0.1:7602",
        "EVALUATION_ADDRESS": "127.0.0.1:7603",
        "REWARD_ADDRESSES": "localhost,127.0.0.1,[::1]",
        "JUDGE_ADDRESSES": "localhost,127.0.0.1,[::1]",
        "JUDGE_KEYS": "",
    }
)
"""Settings that mean the same to every process, each with its one default."""

SECTIONS = ("DATA", "TRAINING", "EVALUATION", "WORKER", "CLIENT", "DAEMON", "TRACES", "WEBHOOKS")

_PREFIX = "LUTHIER_"
_FILE = "LUTHIER_CONFIG"


@dataclass(frozen=True, slots=True)
class _Setting:
    variable: str
    text: str


def read(
    config: type[C], *, section: str, environ: Mapping[str, str] | None = None, is_part: bool = False
) -> C:
    """Return a configuration of the given frozen dataclass, read from the environment and the file it names.

    `section` is one of `SECTIONS`. Field types: str, int, float, bool, Path, tuple[str, ...], and each `| None`; or a
    dataclass that has settings which several sections have alike, by their own names.
    A shared field has no default in the dataclass: `SHARED` has it. `environ` is the process's own by default. With
    `is_part` the section has other settings too: the process whose section it is reads them.

    Raises InvalidArgument that names the variable, the value and what would be right, for a name that nobody
    declares, a value of the wrong type, and a required setting that is missing.
    """
    assert section in SECTIONS, f"section must be one of {SECTIONS}, got {section!r}"
    environ = os.environ if environ is None else environ
    own = list(_variables(config, section))
    given = {
        name: _Setting(name, text)
        for name, text in environ.items()
        if name.startswith(_PREFIX) and name != _FILE
    }
    if path := environ.get(_FILE):
        given = _read_file(Path(path).expanduser()) | given
    _refuse_unknown(given, "" if is_part else section, own)
    return _read(config, section, given)


def others() -> dict[str, str]:
    """Return the environment without settings of ours, which may hold passwords: what libraries read."""
    return {name: text for name, text in os.environ.items() if not name.startswith(_PREFIX)}


def take(names: Iterable[str]) -> dict[str, str]:
    """Take variables out of the environment, so that no process that is started later has them; return their values."""
    return {name: os.environ.pop(name) for name in dict.fromkeys(names) if name in os.environ}


def put(variables: Mapping[str, str]) -> None:
    """Set variables of the environment, for this process, those that it starts, and libraries that are loaded later."""
    os.environ.update(variables)


def _variables(config: type[Any], section: str) -> Iterator[str]:
    """Yield the names of all settings of a dataclass."""
    hints = get_type_hints(config)
    for field in fields(config):
        if (part := _part(hints[field.name])) is not None:
            yield from _variables(part, section)
        else:
            yield _variable(field.name, section)


def _read(config: type[C], section: str, given: Mapping[str, _Setting]) -> C:
    hints = get_type_hints(config)
    values: dict[str, object] = {}
    for field in fields(config):
        hint = hints[field.name]
        if (part := _part(hint)) is not None:
            values[field.name] = _read(part, section, given)
        else:
            values[field.name] = _value(_variable(field.name, section), field, hint, given)
    return config(**values)


def _part(hint: Any) -> type[Any] | None:
    """Return the dataclass that the type of a field is, if it is one."""
    return hint if isinstance(hint, type) and is_dataclass(hint) else None


def _variable(field: str, section: str) -> str:
    name = field.upper()
    return f"{_PREFIX}{name}" if name in SHARED else f"{_PREFIX}{section}_{name}"


def _read_file(path: Path) -> dict[str, _Setting]:
    try:
        document = tomllib.loads(path.read_text())
    except OSError as error:
        raise InvalidArgument(f"{_FILE} must name a readable file, got {path}: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise InvalidArgument(f"{_FILE}: {path} must be TOML: {error}") from error
    found: dict[str, _Setting] = {}
    for key, value in document.items():
        items = value.items() if isinstance(value, dict) else [("", value)]
        for inner, item in items:
            where = f"{key}.{inner}" if inner else key
            name = _PREFIX + where.upper().replace(".", "_")
            found[name] = _Setting(f"{where} in {path}", _text(item, f"{where} in {path}"))
    return found


def _text(value: object, where: str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (str, int, float)):
        return str(value)
    if isinstance(value, list) and all(isinstance(item, str) and "," not in item for item in value):
        return ",".join(value)
    raise InvalidArgument(
        f"{where} must be a string, a number, true, false or a list of strings, got {value!r}"
    )


def _refuse_unknown(given: Mapping[str, _Setting], section: str, own: Iterable[str]) -> None:
    shared = {_PREFIX + name for name in SHARED}
    known = shared | set(own)
    for name, setting in given.items():
        owner = name.removeprefix(_PREFIX).partition("_")[0]
        elsewhere = owner in SECTIONS and owner != section
        if name in known or elsewhere:
            continue
        nearest = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(sorted(known))}"
        raise InvalidArgument(f"{setting.variable} is not a setting ({name}): {hint}")


def _value(name: str, field: Field[Any], hint: Any, given: Mapping[str, _Setting]) -> object:
    shared_default = SHARED.get(name.removeprefix(_PREFIX))
    setting = given.get(name)
    if setting is None and shared_default is not None:
        assert field.default is MISSING, f"the default of {name} belongs in SHARED, not in the dataclass"
        setting = _Setting(name, shared_default)
    if setting is not None:
        return _parse(setting, hint)
    if field.default is not MISSING:
        return field.default
    if field.default_factory is not MISSING:
        return field.default_factory()
    raise InvalidArgument(f"{name} must be set: it has no default")


def _parse(setting: _Setting, declared: Any) -> object:
    choices = tuple(member for member in get_args(declared) if member is not NoneType)
    kind = choices[0] if NoneType in get_args(declared) else declared
    parse, right = _PARSERS[kind]
    try:
        return parse(setting.text)
    except (ValueError, KeyError):
        raise InvalidArgument(f"{setting.variable} must be {right}, got {setting.text!r}") from None


_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}

_PARSERS: Mapping[Any, tuple[Callable[[str], object], str]] = {
    str: (str, "text"),
    int: (int, "a whole number"),
    float: (float, "a number"),
    bool: (lambda text: _TRUTH[text.lower()], "true or false"),
    Path: (lambda text: Path(text).expanduser(), "a path"),
    tuple[str, ...]: (
        lambda text: tuple(item.strip() for item in text.split(",") if item.strip()),
        "a list separated by commas",
    ),
}
