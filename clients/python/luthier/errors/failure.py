"""Why a resource FAILED: an error that is stored instead of raised."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from luthier.errors.tree import BY_CODE, LuthierError


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What a failed resource carries: a gRPC status code name, a `Reason`, a message, its dynamic parts.

    `retry_after_seconds` is set where the failure is passed on to a caller who may try again.
    """

    code: str
    reason: str
    message: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    retry_after_seconds: float | None = None

    @classmethod
    def of(cls, error: LuthierError) -> "Failure":
        """Return what to store when `error` ended the work on a resource."""
        return cls(
            code=error.code,
            reason=str(error.reason),
            message=error.message,
            metadata=dict(error.metadata),
            retry_after_seconds=error.retry_after_seconds,
        )

    def to_error(self) -> LuthierError:
        """Return the error that `of` was given, less its field violations."""
        kind = BY_CODE.get(self.code, LuthierError)
        return kind(
            self.message,
            reason=self.reason,
            metadata=self.metadata,
            retry_after_seconds=self.retry_after_seconds,
        )
