"""Policies: who may call each method of a service, and where its requests say what they are about.

There is no method of which either is not known: a policy that leaves one out is none, and a server takes no method
that no policy names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor

from luthier.runtime.granted_keys import KeyRole
from luthier.runtime.named_resources import field_at, names_resource, subject_field

Role = KeyRole | Literal["worker", "task", "service"]

_NOTHING: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Who may call a method, and where its requests say what they are about.

    Attributes:
        roles: of which who calls needs one.
        subject: the field that names it (`name`, `parent`, `dataset.name`), which no request may leave empty; of a
            stream only the first message must say it. Empty: none does.
        subjectless: why none does. Empty where one does.
    """

    roles: frozenset[Role]
    subject: str = ""
    subjectless: str = ""

    def __post_init__(self) -> None:
        if bool(self.subject) == bool(self.subjectless):
            raise AssertionError("a rule must have a subject, or the reason why there is none")


Policy = Mapping[str, Rule]
"""Rules by the full names of methods (`/luthier.v1.DataService/GetDataset`)."""


def policy_of(
    service: ServiceDescriptor,
    *,
    reads: Iterable[str],
    changes: Iterable[str],
    generates: Iterable[str] = (),
    tasks: Iterable[str] = (),
    subjects: Mapping[str, str] = _NOTHING,
    subjectless: Mapping[str, str] = _NOTHING,
) -> Policy:
    """Return the policy of a public service: what each of its methods does to what it is about; tasks may call some.

    `subjects` and `subjectless` are as in `policy_for`. Raises AssertionError unless each method of the service, and
    no other, is of just one manner.
    """
    manners: tuple[tuple[Role, Iterable[str]], ...] = (
        ("reader", reads),
        ("generator", generates),
        ("writer", changes),
    )
    said = [(name, role) for role, names in manners for name in names]
    of_tasks = set(tasks)
    known = {method.name for method in service.methods}
    times = Counter(name for name, _ in said)
    wrong = {name for name in known | times.keys() if times[name] != 1 or name not in known}
    wrong |= of_tasks - known
    if wrong:
        raise AssertionError(f"{service.full_name} must say once what each method does, see {sorted(wrong)}")
    roles: dict[str, frozenset[Role]] = {
        name: frozenset({role, "task"} if name in of_tasks else {role}) for name, role in said
    }
    return _ruled(service, roles, subjects, subjectless)


def policy_for(
    service: ServiceDescriptor,
    *roles: Role,
    subjects: Mapping[str, str] = _NOTHING,
    subjectless: Mapping[str, str] = _NOTHING,
) -> Policy:
    """Return the policy of a service all of whose methods are for the same roles.

    Args:
        service: its descriptor.
        roles: who may call.
        subjects: fields that say what requests are about, by method, where neither `name` nor `parent` does nor the
            name of what is updated.
        subjectless: why no field does, by method, of those that have none.

    Raises:
        AssertionError: a method has neither a subject nor a reason, or both; or there is no such method or field.
    """
    return _ruled(
        service, {method.name: frozenset(roles) for method in service.methods}, subjects, subjectless
    )


def _ruled(
    service: ServiceDescriptor,
    roles: Mapping[str, frozenset[Role]],
    subjects: Mapping[str, str],
    subjectless: Mapping[str, str],
) -> Policy:
    found = {method.name: _subject(method, subjects) for method in service.methods}
    wrong = {name for name, field in found.items() if bool(field) == bool(subjectless.get(name))}
    wrong |= (subjects.keys() | subjectless.keys()) - found.keys()
    if wrong:
        raise AssertionError(
            f"{service.full_name} must say of each method which field names what it is about, or why none does, "
            f"see {sorted(wrong)}"
        )
    return {
        f"/{service.full_name}/{name}": Rule(
            roles=roles[name], subject=field, subjectless=subjectless.get(name, "")
        )
        for name, field in found.items()
    }


def _subject(method: MethodDescriptor, subjects: Mapping[str, str]) -> str:
    usual, said = subject_field(method.input_type), subjects.get(method.name)
    if said is None:
        return usual
    field = field_at(method.input_type, said)
    is_one = field is not None and names_resource(field) and not field.is_repeated
    if usual or not is_one:
        raise AssertionError(
            f"{method.full_name} must be about a field of its request that names a resource, got {said!r}"
            + (f" beside {usual!r}" if usual else "")
        )
    return said
