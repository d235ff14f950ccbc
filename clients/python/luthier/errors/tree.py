"""The error tree. `luthier.errors` re-exports it; its docstring draws it."""

# Named as gRPC names its codes, so that a reader of either knows the other.

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Self

from luthier.errors.reasons import Reason


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldViolation:
    """What is wrong with one field of a request.

    `field` is the path in proto spelling (`spec.lora.rank`), `description` a sentence, `reason` a `Reason`.
    """

    field: str
    description: str
    reason: str = Reason.INVALID_FIELD


class LuthierError(Exception):
    """Anything that a Luthier service refuses or fails to do: what it raises, its clients receive.

    `code` is the name of the gRPC status code, `reason` a registered `Reason` (or one that a newer service
    knows), `metadata` the dynamic parts of the message, `violations` the fields that are wrong,
    `retry_after_seconds` how long to wait before the same call may succeed (None: it is not said).
    """

    code: ClassVar[str] = "UNKNOWN"
    default_reason: ClassVar[Reason] = Reason.INTERNAL

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
        violations: Iterable[FieldViolation] = (),
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason: str = self.default_reason if reason is None else reason
        self.metadata: Mapping[str, str] = MappingProxyType(dict(metadata or {}))
        self.violations = tuple(violations)
        self.retry_after_seconds = retry_after_seconds

    def amended(self, words: str, metadata: Mapping[str, str]) -> Self:
        """Return an error of the same kind that says and holds more than this one."""
        return type(self)(
            f"{self.message}; {words}",
            reason=self.reason,
            metadata={**self.metadata, **metadata},
            violations=self.violations,
            retry_after_seconds=self.retry_after_seconds,
        )

    def __str__(self) -> str:
        return self.message

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.message!r}, reason={str(self.reason)!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions rebuild themselves from positional `args` alone, which would drop the keyword-only parts.
        parts = (
            self.reason,
            dict(self.metadata),
            self.violations,
            self.retry_after_seconds,
        )
        return _rebuild, (type(self), self.message, parts)


def _rebuild(kind: type[LuthierError], message: str, parts: tuple[Any, ...]) -> LuthierError:
    reason, metadata, violations, retry_after_seconds = parts
    return kind(
        message,
        reason=reason,
        metadata=metadata,
        violations=violations,
        retry_after_seconds=retry_after_seconds,
    )


class InvalidArgument(LuthierError, ValueError):
    """The request is wrong whatever the state of the service: change it before calling again."""

    code = "INVALID_ARGUMENT"
    default_reason = Reason.INVALID_FIELD

    @classmethod
    def of_fields(cls, *violations: FieldViolation) -> "InvalidArgument":
        """Return an error that names at least one field; its reason is that of the first violation."""
        assert violations, "an InvalidArgument made of fields names at least one"
        message = "; ".join(f"{violation.field}: {violation.description}" for violation in violations)
        return cls(message, reason=violations[0].reason, violations=violations)


class NotFound(LuthierError, LookupError):
    """The named resource does not exist."""

    code = "NOT_FOUND"
    default_reason = Reason.RESOURCE_NOT_FOUND


class AlreadyExists(LuthierError):
    """A resource of this name exists already."""

    code = "ALREADY_EXISTS"
    default_reason = Reason.RESOURCE_EXISTS


class FailedPrecondition(LuthierError):
    """The resource is not in a state that allows the call."""

    code = "FAILED_PRECONDITION"
    default_reason = Reason.WRONG_STATE


class Aborted(LuthierError):
    """Somebody else changed the resource in between: read it again, then repeat the whole change."""

    code = "ABORTED"
    default_reason = Reason.ETAG_MISMATCH


class OutOfRange(LuthierError):
    """A position lies beyond what exists (or exists no longer)."""

    code = "OUT_OF_RANGE"
    default_reason = Reason.VALUE_OUT_OF_RANGE


class PermissionDenied(LuthierError, PermissionError):
    """The caller is known and may not do this."""

    code = "PERMISSION_DENIED"
    default_reason = Reason.PERMISSION_DENIED


class Unauthenticated(LuthierError):
    """The caller did not say who it is, or its credentials are not valid."""

    code = "UNAUTHENTICATED"
    default_reason = Reason.CREDENTIALS_INVALID


class ResourceExhausted(LuthierError):
    """A limit or quota is used up; with `retry_after_seconds` the same call may succeed later."""

    code = "RESOURCE_EXHAUSTED"
    default_reason = Reason.OVERLOADED


class Unavailable(LuthierError, ConnectionError):
    """The service cannot be reached or is stopping. The same call may be made again."""

    code = "UNAVAILABLE"
    default_reason = Reason.SERVICE_UNAVAILABLE


class DeadlineExceeded(LuthierError, TimeoutError):
    """The deadline passed; whether the call took effect is not known. `request_id` makes a retry safe."""

    code = "DEADLINE_EXCEEDED"
    default_reason = Reason.DEADLINE_EXCEEDED


class Cancelled(LuthierError):
    """The call or the job was cancelled. An outcome; `asyncio.CancelledError` is a control signal."""

    code = "CANCELLED"
    default_reason = Reason.CANCELLED_BY_USER


class DataLoss(LuthierError):
    """Stored bytes are missing or are not what was stored."""

    code = "DATA_LOSS"
    default_reason = Reason.DATA_CORRUPTED


class Internal(LuthierError):
    """A fault of the service. The metadata's `request_id` finds it in the service's log."""

    code = "INTERNAL"
    default_reason = Reason.INTERNAL


class Unimplemented(LuthierError, NotImplementedError):
    """The service does not know this method."""

    code = "UNIMPLEMENTED"
    default_reason = Reason.METHOD_UNIMPLEMENTED


BY_CODE: Mapping[str, type[LuthierError]] = MappingProxyType(
    {kind.code: kind for kind in LuthierError.__subclasses__()}
)
"""Class of each gRPC status code name; a code that is not here (`UNKNOWN`) is a plain `LuthierError`."""
