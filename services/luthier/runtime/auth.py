"""Who calls, what they may call, and about which projects: all that is authorised is authorised here.

A credential is a principal with roles and projects. `permit` holds its roles against the rule of the method, and
`confine` what a request names against its projects, before anybody looks whether it exists. No servicer does either.
"""

import base64
import binascii
import hashlib
import hmac
import json
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

from google.protobuf.message import Message

from luthier.errors import FieldViolation, InvalidArgument, PermissionDenied, Reason, Unauthenticated
from luthier.runtime.granted_keys import ALL_PROJECTS, KEY_ROLES, GrantedKey
from luthier.runtime.keys import Keys
from luthier.runtime.named_resources import form_of, references_of, subject_of
from luthier.runtime.names import project_named
from luthier.runtime.policies import Policy, Role, Rule

Kind = Literal["key", "worker", "task"]

HOLDER = "holds"
"""Task that a service's own tokens for holds name; no worker's token does."""

_TOKEN_PREFIX = "lt_"
_MOST_VIOLATIONS = 20
_WHO: Mapping[Role, str] = {
    "reader": "a key with the role reader",
    "generator": "a key with the role generator",
    "writer": "a key with the role writer",
    "worker": "a worker",
    "task": "a task",
    "service": "another service",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """Who calls.

    Attributes:
        kind: what was shown: an API key, the key of workers, or the token of a task or a service.
        subject: tells it from others of its kind.
        roles: what it may call.
        projects: ids of those that it may name; None: whichever.
        resources: all that a task may touch, with what lies below.
    """

    kind: Kind
    subject: str
    roles: frozenset[Role] = frozenset()
    projects: frozenset[str] | None = None
    resources: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind}:{self.subject}"


_principal: ContextVar[Principal | None] = ContextVar("luthier_principal", default=None)


def current_principal() -> Principal | None:
    """Return who makes the call that is being handled; None outside of a call and in a health check."""
    return _principal.get()


def set_principal(principal: Principal | None) -> None:
    """Set who makes the current call. For the server's own use."""
    _principal.set(principal)


class TaskTokens:
    """Makes and checks the tokens that let a task's worker, or a service on a task's behalf, read at another service.

    A token is signed, names its project and resources, and ends by the wall clock. It needs no database: services
    that share the secret trust one another's.
    """

    def __init__(self, secret: str | bytes, *, clock: Callable[[], float] = time.time) -> None:
        self._secret = secret.encode() if isinstance(secret, str) else secret
        assert len(self._secret) >= 16, "a signing secret has at least 128 bits"
        self._clock = clock

    def mint(
        self, project: str, resources: Iterable[str], epoch: int, task: str, lifetime_seconds: float
    ) -> str:
        """Return a token for a task in one of its epochs that may read `resources` for a while."""
        claims = {
            "project": project,
            "resources": list(resources),
            "epoch": epoch,
            "task": task,
            "expires": self._clock() + lifetime_seconds,
        }
        payload = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
        return f"{_TOKEN_PREFIX}{payload}.{self._mac(payload)}"

    def verify(self, token: str) -> Principal:
        """Return whose token it is. Raises Unauthenticated CREDENTIALS_INVALID, without a word of the token."""
        payload, _, mac = token.removeprefix(_TOKEN_PREFIX).partition(".")
        if not token.startswith(_TOKEN_PREFIX) or not hmac.compare_digest(
            mac.encode(), self._mac(payload).encode()
        ):
            raise Unauthenticated("the task token is not one of ours")
        try:
            claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        except (binascii.Error, ValueError) as error:
            raise AssertionError("a token with our signature has our format") from error
        if self._clock() >= claims["expires"]:
            raise Unauthenticated("the task token has expired; ask for a new one by a heartbeat")
        return Principal(
            kind="task",
            subject=f"{claims['task']}@{claims['epoch']}",
            roles=frozenset({"service" if claims["task"] == HOLDER else "task"}),
            projects=frozenset({claims["project"]}),
            resources=tuple(claims["resources"]),
        )

    def _mac(self, payload: str) -> str:
        return hmac.digest(self._secret, b"task-token\0" + payload.encode(), "sha256").hex()


class Authenticator:
    """Finds who calls from the `authorization` metadata. Keeps digests of the keys, not the keys."""

    def __init__(
        self,
        keys: Keys,
        task_tokens: TaskTokens | None = None,
        *,
        projects: Collection[str] | None = None,
        granted: Iterable[GrantedKey] = (),
    ) -> None:
        """Take the secrets of a home, who checks its tasks' tokens, and the keys of some projects and roles.

        `projects` are the ids of those that are served, which nobody gets beyond; None: whichever.
        """
        self._tokens = task_tokens or TaskTokens(keys.token_secret)
        self._served = None if projects is None else frozenset(projects)
        api, worker = _sha256(keys.api_key), _sha256(keys.worker_key)
        known: list[tuple[bytes, Principal]] = [
            (api, Principal(kind="key", subject=api.hex()[:12], roles=frozenset(KEY_ROLES))),
            (worker, Principal(kind="worker", subject=worker.hex()[:12], roles=frozenset({"worker"}))),
        ]
        for one in granted:
            projects_of = None if ALL_PROJECTS in one.projects else one.projects
            principal = Principal(
                kind="key", subject=one.name, roles=frozenset(one.roles), projects=projects_of
            )
            known.append((one.digest, principal))
        self._known = tuple((digest, self._where_served(principal)) for digest, principal in known)

    def authenticate(self, authorization: str | None) -> Principal:
        """Return who calls. Raises Unauthenticated CREDENTIALS_MISSING or CREDENTIALS_INVALID."""
        secret = _bearer(authorization)
        if not secret.startswith(_TOKEN_PREFIX):
            return self._holder(secret)
        bearer = self._tokens.verify(secret)
        # What a service holds it must be able to let go when its project is not served any more.
        return bearer if "service" in bearer.roles else self._where_served(bearer)

    def key_holder(self, authorization: str | None) -> Principal | None:
        """Return whose key a call shows, as `authenticate` does and raises; None for a token, which is not looked at.

        Keys are those of the service's start, so that it stays true for as long as the call lasts.
        """
        secret = _bearer(authorization)
        return None if secret.startswith(_TOKEN_PREFIX) else self._holder(secret)

    def _holder(self, secret: str) -> Principal:
        digest = _sha256(secret)
        # Every key is compared, and in constant time: the time taken tells nothing of any key.
        found = [principal for known, principal in self._known if hmac.compare_digest(digest, known)]
        if not found:
            raise Unauthenticated("the key is not known here")
        return found[0]

    def _where_served(self, principal: Principal) -> Principal:
        if self._served is None:
            return principal
        own = self._served if principal.projects is None else principal.projects & self._served
        return replace(principal, projects=own)


def permit(principal: Principal, method: str, policy: Policy) -> Rule:
    """Return the rule of a method. Raises PermissionDenied for who lacks its roles; what has none is for nobody."""
    rule = policy.get(method)
    if rule is not None and not principal.roles.isdisjoint(rule.roles):
        return rule
    who = "only " + " or ".join(_WHO[role] for role in sorted(rule.roles)) if rule is not None else "nobody"
    has = f" with the roles {', '.join(sorted(principal.roles)) or 'none'}" if principal.kind == "key" else ""
    raise PermissionDenied(
        f"a {principal.kind}{has} may not call {method}, {who} may",
        metadata={"method": method, "kind": principal.kind},
    )


def confine(principal: Principal, request: Message, rule: Rule, *, is_first: bool = True) -> None:
    """Raise unless everything that a request names is the principal's to name. No other code checks projects.

    What a request refers to must be of the project that it is about, whoever asks: that is told first, as it tells
    nothing of the other project. A name of no project is let pass: no resource has it, and whoever handles the request
    says what it must be. A message of a stream that is not the first need not say what it is about.

    Raises:
        PermissionDenied: a project that is not the principal's, or not served: it cannot tell which; or a task's
            request about what its token does not name.
        InvalidArgument: FIELD_REQUIRED, it does not say what it is about; CROSS_PROJECT_REFERENCE.
    """
    subject = subject_of(request, rule.subject)
    if rule.subject and not subject and is_first:
        raise _about_nothing(request, rule.subject)
    if principal.kind == "worker":
        return
    if principal.kind == "task":
        _require_granted(principal, subject)
    project = project_named(subject)
    if project is not None:
        _require_project(principal, project)
    if project is None:
        for _, name in references_of(request, rule.subject):
            if (other := project_named(name)) is not None:
                _require_project(principal, other)
        return
    # No more are looked for than an answer has room for: a request may hold very many.
    crossing = list(islice(_crossing(request, rule.subject, project), _MOST_VIOLATIONS))
    if crossing:
        raise InvalidArgument.of_fields(*crossing)


def _about_nothing(request: Message, field: str) -> InvalidArgument:
    form = form_of(request, field) or "projects/{project}, or the name of what is in one"
    return InvalidArgument.of_fields(
        FieldViolation(
            field=field,
            description=f"must say what the call is about: {form}, got ''",
            reason=Reason.FIELD_REQUIRED,
        )
    )


def _crossing(request: Message, subject: str, project: str) -> Iterator[FieldViolation]:
    for path, name in references_of(request, subject):
        if project_named(name) not in (None, project):
            yield FieldViolation(
                field=".".join(path),
                description=f"must be in projects/{project}, got {name!r}",
                reason=Reason.CROSS_PROJECT_REFERENCE,
            )


def _require_project(principal: Principal, project: str) -> None:
    if principal.projects is not None and project not in principal.projects:
        raise PermissionDenied(f"no access to projects/{project}", metadata={"project": project})


def _require_granted(principal: Principal, subject: str) -> None:
    if not any(subject == resource or subject.startswith(f"{resource}/") for resource in principal.resources):
        raise PermissionDenied(
            f"the task may not touch {subject or 'what its token does not name'}",
            metadata={"resource": subject},
        )


def _bearer(authorization: str | None) -> str:
    if not authorization:
        raise Unauthenticated(
            "the call must carry `authorization: Bearer <key>` metadata",
            reason=Reason.CREDENTIALS_MISSING,
        )
    scheme, _, secret = authorization.partition(" ")
    if scheme.lower() != "bearer" or not secret:
        raise Unauthenticated("`authorization` must be `Bearer <key>`")
    return secret


def _sha256(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
