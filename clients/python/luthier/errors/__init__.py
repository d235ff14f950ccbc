"""The error tree that services raise and clients receive. Standard library only.

    LuthierError                      gRPC status code
    +-- InvalidArgument   (ValueError)          INVALID_ARGUMENT
    +-- NotFound          (LookupError)         NOT_FOUND
    +-- AlreadyExists                           ALREADY_EXISTS
    +-- FailedPrecondition                      FAILED_PRECONDITION
    +-- Aborted                                 ABORTED
    +-- OutOfRange                              OUT_OF_RANGE
    +-- PermissionDenied  (PermissionError)     PERMISSION_DENIED
    +-- Unauthenticated                         UNAUTHENTICATED
    +-- ResourceExhausted                       RESOURCE_EXHAUSTED
    +-- Unavailable       (ConnectionError)     UNAVAILABLE
    +-- DeadlineExceeded  (TimeoutError)        DEADLINE_EXCEEDED
    +-- Cancelled                               CANCELLED
    +-- DataLoss                                DATA_LOSS
    +-- Internal                                INTERNAL
    +-- Unimplemented     (NotImplementedError) UNIMPLEMENTED

A program switches on the class, then on `reason` (see `Reason`); the message is for people.
"""

from luthier.errors.failure import Failure
from luthier.errors.reasons import DOMAIN, Reason
from luthier.errors.tree import (
    BY_CODE,
    Aborted,
    AlreadyExists,
    Cancelled,
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    FieldViolation,
    Internal,
    InvalidArgument,
    LuthierError,
    NotFound,
    OutOfRange,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)

__all__ = [
    "BY_CODE",
    "DOMAIN",
    "Aborted",
    "AlreadyExists",
    "Cancelled",
    "DataLoss",
    "DeadlineExceeded",
    "FailedPrecondition",
    "Failure",
    "FieldViolation",
    "Internal",
    "InvalidArgument",
    "LuthierError",
    "NotFound",
    "OutOfRange",
    "PermissionDenied",
    "Reason",
    "ResourceExhausted",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
]
