"""The message that a command sends, put together from its defaults, a file, flags and assignments, in this order."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import click
from click.core import ParameterSource

from luthier.client.cli.session import Session
from luthier.client.escaping import escaped, escaped_line
from luthier.errors import InvalidArgument

if TYPE_CHECKING:
    from google.protobuf.descriptor import FieldDescriptor
    from google.protobuf.message import Message

M = TypeVar("M", bound="Message")
_MAX_NAMED = 12


class FieldOption(click.Option):
    """A flag that stands for `--set field=VALUE`, and for one more element each time where the field is a list.

    `excludes`: a flag that cannot stand beside it. `is_read` False: the command reads the flag itself; the field says
    only what it is for.
    """

    def __init__(
        self, *declared: Any, field: str, excludes: str = "", is_read: bool = True, **settings: Any
    ) -> None:
        super().__init__(*declared, **settings)
        self.field = field
        self.excludes = excludes
        self.is_read = is_read

    @property
    def shown(self) -> str:
        """How people know it."""
        return f"option '{self.opts[-1]}'"


field_option = partial(click.option, cls=FieldOption)
"""`click.option` for a `FieldOption`."""


class FieldArgument(click.Argument):
    """An argument that stands for `--set field=VALUE`."""

    excludes = ""
    is_read = True

    def __init__(self, *declared: Any, field: str, **settings: Any) -> None:
        super().__init__(*declared, **{"required": False, **settings})
        self.field = field

    @property
    def shown(self) -> str:
        """How people know it."""
        return f"argument '{self.human_readable_name}'"


class Draft(Generic[M]):
    """A message that is being put together: `message` holds all but the assignments, which `finish` makes.

    `message` may hold the name of the resource that the file shows.
    """

    def __init__(self, session: Session, context: click.Context, kind: type[M]) -> None:
        self._fields = [one for one in context.command.params if isinstance(one, FieldOption | FieldArgument)]
        self._context = context
        self._file: str | None = context.params["file"]
        self._assignments: tuple[str, ...] = context.params["assignments"]
        self.message = kind()
        values = {one: context.params[str(one.name)] for one in self._fields if one.is_read}
        given = {one: value for one, value in values.items() if not _is_default(context, one)}
        with _as_usage_error():
            self._apply({one: value for one, value in values.items() if one not in given})
            if self._file is not None:
                self._read(session, self._file)
            self._apply(given)

    @property
    def words(self) -> str:
        """Flags, file and assignments as they are typed, for another command that takes them."""
        words: list[str] = []
        for option in self._fields:
            if isinstance(option, FieldOption) and not _is_default(self._context, option):
                words += _typed(option, self._context.params[str(option.name)])
        words += [] if self._file is None else ["-f", self._file]
        return shlex.join([*words, *(word for text in self._assignments for word in ("--set", text))])

    def finish(self) -> M:
        """Make the assignments and return the message, without a name.

        Raises UsageError, also for a required field that is not set.
        """
        from luthier.client.message_files import assign

        with _as_usage_error():
            for text in self._assignments:
                path, equals, value = text.partition("=")
                if not equals:
                    raise click.BadParameter(f"must be PATH=VALUE, got {text!r}", param_hint="--set")
                assign(self.message, path.strip(), value, source="--set")
        for field in self.message.DESCRIPTOR.fields:
            self._finish_field(cast("FieldDescriptor", field))
        return self.message

    def _read(self, session: Session, path: str) -> None:
        from luthier.client.documents import MAX_BYTES
        from luthier.client.message_files import read_message

        source = "<stdin>" if path == "-" else escaped_line(path)
        with click.open_file(path, "rb") as file:
            reading = read_message(file.read(MAX_BYTES + 1), type(self.message), source=source)
        self.message.MergeFrom(reading.message)
        if reading.ignored:
            named = ", ".join(reading.ignored[:_MAX_NAMED]) + (
                ", ..." if reading.ignored[_MAX_NAMED:] else ""
            )
            session.note(f"{source}: not taken, as the service writes it itself: {named}")

    def _apply(self, given: Mapping[FieldOption | FieldArgument, Any]) -> None:
        from luthier.client.message_files import assign

        names = {one.opts[-1] for one, value in given.items() if value is not None}
        for parameter, value in given.items():
            source, field = parameter.opts[-1], parameter.field
            if source in names and parameter.excludes in names:
                raise click.UsageError(f"give one of {parameter.excludes} and {source}")
            if isinstance(value, tuple):
                if value:
                    assign(self.message, field, "null", source=source)
                for one in value:
                    assign(self.message, f"{field}[]", str(one), source=source)
            elif value is not None and value is not False:
                assign(self.message, field, "true" if value is True else str(value), source=source)

    def _finish_field(self, field: FieldDescriptor) -> None:
        from luthier.client.field_values import is_identifier, is_required

        if is_identifier(field):
            self.message.ClearField(field.name)
        parameter = next((one for one in self._fields if one.field == field.name), None)
        if is_required(field) and parameter and not getattr(self.message, field.name):
            raise click.UsageError(f"Missing {parameter.shown}, or {field.name} in a file or by --set.")


def message_of(path: str, kind: type[M]) -> M:
    """Read a message from a file of YAML or JSON. Raises UsageError that names the place in it."""
    from luthier.client.documents import MAX_BYTES
    from luthier.client.message_files import read_message

    with click.open_file(path, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    with _as_usage_error():
        return read_message(data, kind, source=escaped_line(path)).message


def pass_draft(kind: Callable[[], type[M]]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command, behind its session, the draft of a message, and -f and --set to people.

    The draft takes the place of the flags that stand for fields of the message.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @wraps(function)
        def command(session: Session, /, **given: Any) -> None:
            context = click.get_current_context()
            draft = Draft(session, context, kind())
            taken = {one.name for one in context.command.params if getattr(one, "is_read", False)}
            own = {
                name: value for name, value in given.items() if name not in {*taken, "file", "assignments"}
            }
            function(session, draft, **own)

        return _FILE(_SET(command))

    return decorate


_FILE = click.option(
    "-f",
    "--file",
    type=click.Path(exists=True, dir_okay=False, allow_dash=True),
    metavar="FILE",
    help="Message in YAML or JSON, as --json prints it; - is standard input. Flags win over it.",
)
_SET = click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="PATH=VALUE",
    help="Set a field of the message, e.g. labels.team=nlp, arms[0].num_shots=3, metrics[]=perplexity. Wins over file "
    "and flags, a later one over an earlier one.",
)


def _typed(option: FieldOption, value: Any) -> Iterator[str]:
    """Yield the words of a flag that was given; a value that is more than its word has that as `word`."""
    for one in value if isinstance(value, tuple) else (value,):
        yield option.opts[-1]
        if not option.is_flag:
            yield str(getattr(one, "word", one))


def _is_default(context: click.Context, parameter: click.Parameter) -> bool:
    return context.get_parameter_source(str(parameter.name)) is ParameterSource.DEFAULT


@contextmanager
def _as_usage_error() -> Iterator[None]:
    try:
        yield
    except InvalidArgument as error:
        raise click.UsageError(escaped(error.message)) from error
