"""Resource names: `projects/{project}/datasets/{dataset}` (AIP-122), parsed once, at the boundary."""

import re
import secrets
import string
from dataclasses import dataclass
from functools import cached_property

from luthier.errors import FieldViolation, InvalidArgument, Reason
from luthier.runtime.field_limits import matching

ID_RULE = "1 to 63 lowercase letters, digits and hyphens, starting with a letter, not ending with a hyphen"

_ID = r"[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?"
ID_LIMIT = matching(re.compile(_ID), ID_RULE)
_PROJECT = re.compile(rf"projects/({_ID})(?:/|\Z)")
_PLACE = re.compile(r"\{(\w+)\}")
_ALPHABET = string.ascii_lowercase + string.digits


@dataclass(frozen=True)
class Pattern:
    """The pattern of one family's resource names: literal collections and `{placeholders}` for ids."""

    text: str

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        return re.compile(_PLACE.sub(rf"(?P<\1>{_ID})", self.text))

    @cached_property
    def parent(self) -> "Pattern":
        """The pattern of what resources of this one belong to: less the last collection and its id."""
        return Pattern("/".join(self.text.split("/")[:-2]))

    def parse(self, name: str, *, field: str = "name") -> dict[str, str]:
        """Return the id of each placeholder. Raises InvalidArgument that names the field, value and pattern."""
        match = self._regex.fullmatch(name)
        if match is None:
            required = f"must be {self.text}, each id {ID_RULE}, got {name!r}"
            raise InvalidArgument.of_fields(
                FieldViolation(
                    field=field,
                    description=required,
                    reason=Reason.INVALID_FIELD if name else Reason.FIELD_REQUIRED,
                )
            )
        return match.groupdict()

    def format(self, **ids: str) -> str:
        """Return the name with these ids. Raises InvalidArgument for an id against the rule."""
        for field, value in ids.items():
            check_id(value, field=field)
        return self.text.format(**ids)


@dataclass(frozen=True)
class AnyOf:
    """Several patterns that differ in their length: a name is one of them."""

    patterns: tuple[Pattern, ...]

    def parse(self, name: str, *, field: str = "name") -> dict[str, str]:
        """Return the ids as the pattern of a name's length does, the first pattern where none has it."""
        depth = name.count("/")
        return next((one for one in self.patterns if one.text.count("/") == depth), self.patterns[0]).parse(
            name, field=field
        )


PROJECT = Pattern("projects/{project}")


def check_id(value: str, *, field: str) -> str:
    """Return an id that a caller chose; raise InvalidArgument when it is against the rule."""
    if not ID_LIMIT.allows(value):
        description = f"{ID_LIMIT.rule}, got {value!r}"
        raise InvalidArgument.of_fields(FieldViolation(field=field, description=description))
    return value


def new_id(prefix: str) -> str:
    """Return an id that no other resource has: the prefix, a hyphen and 12 random characters (62 bits)."""
    return f"{prefix}-{''.join(secrets.choice(_ALPHABET) for _ in range(12))}"


def project_named(name: str) -> str | None:
    """Return the project's id in the name of a resource or a project; None for what no resource can have as a name."""
    match = _PROJECT.match(name)
    return None if match is None else match.group(1)


def project_of(name: str) -> str:
    """Return the project's id in the name of a resource or a project. Raises InvalidArgument where there is none."""
    project = project_named(name)
    if project is None:
        raise InvalidArgument(f"a resource name must start with projects/{{project}}, got {name!r}")
    return project


def child_name(parent: str, collection: str, chosen_id: str, *, field: str, prefix: str) -> str:
    """Return the name of a new resource below `parent`; without a chosen id one is made that begins with `prefix`.

    `field` is that of the id in the request (`dataset_id`). Raises InvalidArgument for an id against the rule.
    """
    return f"{parent}/{collection}/{check_id(chosen_id or new_id(prefix), field=field)}"
